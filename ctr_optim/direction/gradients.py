"""Check whether a step's gradients are finite, dense and real."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor

from ctr_optim.runtime import distributed
from ctr_optim.runtime.devices import together
from ctr_optim.runtime.messages import warn_skipped


def all_finite(groups: Iterable[dict[str, Any]], known: Container[int] = (), found: Tensor | None = None) -> Tensor:
    """Return ``()`` whether every gradient is finite, without waiting for a device.

    On the CPU this warns if a gradient is not finite. Processes with sharded gradients (FSDP2) share the result. In all
    other cases every process holds the same gradients.

    Args:
        groups: parameter groups.
        known: ids of parameters whose gradients were checked before.
        found: ``()`` the result of that earlier check; None if there was none.

    Raises:
        TypeError: for a sparse or complex gradient.
    """
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None and id(p) not in known]
    by_device: dict[torch.device, list[Tensor]] = {}
    for g in grads:
        if g.is_sparse or g.is_complex():
            kind = "sparse" if g.is_sparse else "complex"
            raise TypeError(
                f"CTROptimizer got a {kind} gradient of shape {tuple(g.shape)}, expected a dense, real gradient. Build "
                "embeddings with sparse=False, and give complex parameters to another optimizer."
            )
        part = distributed.local(g)
        if part.numel() > 0:
            by_device.setdefault(g.device, []).append(part)
    looks = [] if found is None else [found]
    looks += [torch.isfinite(torch.stack(torch._foreach_norm(some, math.inf))).all() for some in by_device.values()]
    finite = together(looks).all() if looks else torch.ones((), dtype=torch.bool, device=grads[0].device)
    if any(map(distributed.is_sharded, grads)):
        finite = distributed.everywhere(finite)
    if finite.device.type == "cpu" and not finite:
        warn_skipped()
    return finite
