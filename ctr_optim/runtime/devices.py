"""Scalars on several devices, and matrix products in full precision under autocast or TF32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


def together(scalars: Sequence[Tensor]) -> Tensor:
    """Stack ``()`` tensors into one ``(n,)`` tensor on the first tensor's device, without synchronisation.

    A model that ``device_map`` distributes has its layers on several devices.
    """
    home = scalars[0].device
    return torch.stack([s.to(home, non_blocking=True) for s in scalars])


@contextmanager
def exact(devices: Iterable[torch.device]) -> Iterator[None]:
    """Disable autocast and TF32 on these devices, so that products of float32 matrices have float32 precision."""
    with ExitStack() as stack:
        for kind in sorted({device.type for device in devices}):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
            if kind == "cuda":
                stack.enter_context(_no_tf32())
        yield


@contextmanager
def _no_tf32() -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    switch: tuple[str, Any] = "allow_tf32", False
    try:
        before = matmul.allow_tf32
    except RuntimeError:  # allow_tf32 cannot be read once the user has set the newer option, fp32_precision
        switch, before = ("fp32_precision", "ieee"), matmul.fp32_precision
    name, off = switch
    if before == off:
        yield
        return
    setattr(matmul, name, off)
    try:
        yield
    finally:
        setattr(matmul, name, before)
