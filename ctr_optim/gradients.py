"""What a step must know of its gradients: whether they can be used, and what scale they had in backward."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor

from ctr_optim import distributed
from ctr_optim.devices import together


def all_finite(groups: Iterable[dict[str, Any]], known: Container[int] = (), found: Tensor | None = None) -> Tensor:
    """``()`` whether every gradient is finite, without waiting for any device; tells where it is not, on the CPU.

    Processes that hold parts of the gradients (FSDP2) agree; elsewhere all of them hold the same ones.

    Args:
        groups: parameter groups.
        known: ids of parameters that were looked at already, and ``found``, what was found.

    Raises:
        TypeError: for a sparse or complex gradient.
    """
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None and id(p) not in known]
    by_device: dict[torch.device, list[Tensor]] = {}
    for g in grads:
        if g.is_sparse or g.is_complex():
            kind = "sparse" if g.is_sparse else "complex"
            raise TypeError(f"CTROptimizer got a {kind} gradient of shape {tuple(g.shape)}; expected dense and real")
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


def users_line() -> int:
    """The ``stacklevel`` of a warning given by the caller: the first line that is neither torch's nor ours."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "ctr_optim"):
        frame, level = frame.f_back, level + 1
    return level


def warn_skipped() -> None:
    """Tell the user about a step that was not taken; Python shows it once."""
    warnings.warn(
        "CTROptimizer skipped a step: a gradient was not finite. Parameters, moments and factors are untouched; "
        "metrics()['skipped_steps'] counts such steps.",
        stacklevel=users_line(),
    )


def warn_failed(what: str, instead: str) -> None:
    """Tell the user about a matrix decomposition that did not converge; Python shows it once."""
    warnings.warn(
        f"CTROptimizer could not decompose {what}: {instead}. metrics()['failed_decompositions'] counts such failures.",
        stacklevel=users_line(),
    )


def grad_scale() -> float | Tensor:
    """The loss scale of the GradScaler that called the running ``step()``, or 1.

    The scaler unscales ``p.grad`` but cannot reach what the taps staged, and hides its scale from optimizers when the
    user unscaled early to clip. It is the caller of ``step()``, a few frames up.
    """
    frame = sys._getframe(2)
    for _ in range(20):
        # f_locals of the user's own frames would keep their variables alive: look into the scaler's alone
        scaler = frame.f_locals.get("self") if frame.f_globals.get("__name__") == "torch.amp.grad_scaler" else None
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler._scale if scaler._scale is not None else 1.0
        if frame.f_back is None:
            break
        frame = frame.f_back
    return 1.0
