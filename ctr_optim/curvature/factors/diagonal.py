"""A second moment stored as its diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from ctr_optim.curvature.factors.base import Factor, safe_rsqrt, squares


class Diagonal(Factor):
    """The diagonal ``(..., d)``."""

    fields = ("diagonal",)
    is_diagonal = True

    @staticmethod
    def shapes(width: int) -> tuple[tuple[int, ...], ...]:
        return ((width,),)

    @staticmethod
    def sums(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (squares(rows, dtype),)

    def matmul(self, x: Tensor) -> Tensor:
        return self.tensors[0].unsqueeze(-1) * x

    def whitener(self, damping: float) -> Tensor:
        (diagonal,) = self.tensors
        return safe_rsqrt(diagonal + damping * diagonal.mean(-1, keepdim=True))

    @staticmethod
    def whiten(whitener: Tensor | tuple[Tensor, ...], x: Tensor, transpose: bool = False) -> Tensor:
        assert isinstance(whitener, Tensor)
        return whitener.unsqueeze(-1) * x

    def to_dense(self) -> Tensor:
        return torch.diag_embed(self.tensors[0])
