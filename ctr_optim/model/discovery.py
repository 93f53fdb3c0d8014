"""Discovery of the models that own the optimizer's parameters."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from itertools import compress

from torch import nn


def live_modules() -> list[nn.Module]:
    """Return all live modules, as the garbage collector lists them."""
    objects = gc.get_objects()
    types = list(map(type, objects))  # not isinstance(): dead weak proxies raise when they are asked for __class__
    kinds = {t for t in set(types) if issubclass(t, nn.Module)}
    return [o for o in compress(objects, map(kinds.__contains__, types)) if "_modules" in o.__dict__]


def find_roots(parameters: Iterable[nn.Parameter]) -> list[nn.Module]:
    """Return the outermost live modules that hold any of ``parameters``.

    Users of ``torch.optim`` pass bare parameters, so the optimizer has to find the modules itself. The search reads
    only ``_parameters`` and ``_modules`` and takes about 0.1 seconds.

    Returns:
        the modules, those with most submodules first.
    """
    wanted = {id(p): place for place, p in reversed(list(enumerate(parameters)))}
    modules = live_modules()
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module._modules.values():
            if child is not None:
                parents.setdefault(id(child), []).append(module)
    roots: dict[int, nn.Module] = {}
    seen: set[int] = set()
    frontier = [m for m in modules if any(id(p) in wanted for p in m._parameters.values())]
    while frontier:
        module = frontier.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        above = parents.get(id(module), [])
        if above:
            frontier.extend(above)
        else:
            roots[id(module)] = module

    def place(root: nn.Module) -> tuple[int, int]:
        """Return a sort key that is the same in all processes, unlike the order of the garbage collector."""
        return -sum(1 for _ in root.modules()), min(wanted.get(id(p), len(wanted)) for p in root.parameters())

    return sorted(roots.values(), key=place)
