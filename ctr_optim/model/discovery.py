"""Find the models that own some parameters, given the parameters alone."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from itertools import compress

from torch import nn


def live_modules() -> list[nn.Module]:
    """Every module that is alive; by type(): weak proxies in the heap raise when asked for their class."""
    objects = gc.get_objects()
    types = list(map(type, objects))
    kinds = {t for t in set(types) if issubclass(t, nn.Module)}
    return [o for o in compress(objects, map(kinds.__contains__, types)) if "_modules" in o.__dict__]


def find_roots(parameters: Iterable[nn.Parameter]) -> list[nn.Module]:
    """The outermost modules that hold any of ``parameters``, by a scan of the live modules.

    Every ``torch.optim`` user passes bare parameters; this is what makes that enough. The scan reads only
    ``_parameters`` and ``_modules``, costs about a tenth of a second, and runs once, at construction.
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
        """Larger models first; then by their first parameter, for the heap's order differs between processes."""
        return -sum(1 for _ in root.modules()), min(wanted.get(id(p), len(wanted)) for p in root.parameters())

    return sorted(roots.values(), key=place)
