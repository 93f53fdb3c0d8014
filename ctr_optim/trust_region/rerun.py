"""Run a model again without a trace: inputs cut and copied, parameters moved and restored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class CannotRerun(Exception):
    """The inputs of the model's forward hold something that cannot safely be used twice."""


@contextmanager
def moved(
    changes: Sequence[tuple[Sequence[Tensor], Sequence[Tensor] | None]], factor: float | Tensor = 1.0
) -> Iterator[None]:
    """Displace parameters by ``factor`` times their deltas (None: to zero) for a while; restored bit for bit."""
    saved = [(list(params), [p.clone() for p in params]) for params, _ in changes]
    try:
        for (params, _), (_, delta) in zip(saved, changes, strict=True):
            if delta is None:
                torch._foreach_zero_(params)
            else:
                here = factor.to(delta[0].device) if isinstance(factor, Tensor) else factor
                torch._foreach_add_(params, torch._foreach_mul(list(delta), here))
        yield
    finally:
        for params, values in saved:
            torch._foreach_copy_(params, values)


def random_state() -> list[Tensor] | None:
    """Of every generator that a forward may draw from; None within a graph, which cannot look."""
    if torch.compiler.is_compiling():
        return None
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if initialized else [])]


def nothing_drawn(since: list[Tensor] | None) -> bool:
    """Whether all generators are known to be in the state that they were in."""
    now = random_state()
    return since is not None and now is not None and all(map(torch.equal, since, now))


def common_ancestors(root: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """Modules that contain all ``layers``, outermost first."""
    wanted = {id(m) for m in layers}
    paths = [name.split(".") for name, module in root.named_modules() if id(module) in wanted]
    chain, module = [root], root
    for depth in range(min(map(len, paths), default=1) - 1):
        if len({path[depth] for path in paths}) > 1:
            break
        module = getattr(module, paths[0][depth])
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            chain.append(module)
    # a compiled model runs its own hooks eagerly and traces those inside: keep ours out of the graph
    return chain[:1] if hasattr(root, "_orig_mod") else chain


def tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors_in(value)


def take(tree: Any, size: int, keep: int) -> Any:
    """The first ``keep`` of ``size`` sequences of every tensor in nested inputs, as copies."""
    if isinstance(tree, Tensor):
        sliced = tree[:keep] if tree.dim() > 0 and tree.shape[0] == size else tree
        return sliced.detach().clone()
    if isinstance(tree, dict):
        return {key: take(value, size, keep) for key, value in tree.items()}
    if (isinstance(tree, tuple) and type(tree) is tuple) or isinstance(tree, list):
        return type(tree)(take(value, size, keep) for value in tree)
    if tree is None or isinstance(tree, (bool, int, float, str, torch.dtype, torch.device)):
        return tree
    raise CannotRerun(f"an input of type {type(tree).__name__} cannot be run twice")
