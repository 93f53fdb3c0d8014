"""A second moment stored as a full matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ctr_optim.curvature.factors.base import Factor, safe_rsqrt


class Dense(Factor):
    """The full matrix ``(..., d, d)``."""

    fields = ("matrix",)

    @staticmethod
    def shapes(width: int) -> tuple[tuple[int, ...], ...]:
        return ((width, width),)

    @staticmethod
    def sums(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        rows = rows.to(dtype)
        return (rows.mT @ rows,)

    def matmul(self, x: Tensor) -> Tensor:
        return self.tensors[0] @ x

    def whitener(self, damping: float) -> Tensor:
        (matrix,) = self.tensors
        try:
            eigenvalues, vectors = torch.linalg.eigh(matrix)
        except LinAlgError:  # whiten by the diagonal, which is less accurate
            eigenvalues = matrix.diagonal(dim1=-2, dim2=-1)
            vectors = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        eigenvalues = eigenvalues.clamp_min(0)
        roots = safe_rsqrt(eigenvalues + damping * eigenvalues.mean(-1, keepdim=True))
        root: Tensor = (vectors * roots.unsqueeze(-2)) @ vectors.mT
        return root

    @staticmethod
    def whiten(whitener: Tensor | tuple[Tensor, ...], x: Tensor, transpose: bool = False) -> Tensor:
        assert isinstance(whitener, Tensor)
        return whitener @ x

    def to_dense(self) -> Tensor:
        return self.tensors[0]
