"""What devices ask for: a model may lie on several of them, and a GPU may multiply in less than float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def together(scalars: Sequence[Tensor]) -> Tensor:
    """``(n,)`` on the first one's device; nothing waits. ``device_map`` spreads a model over several."""
    home = scalars[0].device
    return torch.stack([s.to(home, non_blocking=True) for s in scalars])


class FullPrecision:
    """Products of float32 matrices in float32, whatever the user chose for the model (a compiled graph keeps that)."""

    def __init__(self, device: torch.device) -> None:
        self.active = device.type == "cuda" and not torch.compiler.is_compiling()

    def __enter__(self) -> None:
        if self.active:
            self.tf32 = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *exc: Any) -> None:
        if self.active:
            torch.backends.cuda.matmul.allow_tf32 = self.tf32
