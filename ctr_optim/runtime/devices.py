"""Tensors on several devices, and exact arithmetic where autocast or TF32 is on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


def together(scalars: Sequence[Tensor]) -> Tensor:
    """``(n,)`` on the first one's device; nothing waits. ``device_map`` spreads a model over several."""
    home = scalars[0].device
    return torch.stack([s.to(home, non_blocking=True) for s in scalars])


@contextmanager
def exact(devices: Iterable[torch.device]) -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the user chose for the model: neither autocast nor TF32."""
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
    except RuntimeError:  # where torch's newer switch was used, the older one refuses to be read
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
