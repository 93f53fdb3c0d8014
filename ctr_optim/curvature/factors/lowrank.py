"""A second moment stored as a Nystrom sketch plus the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from ctr_optim.curvature.factors.base import Factor, safe_rsqrt, squares


class LowRank(Factor):
    """A Nystrom sketch ``Y = F Omega (..., d, k)`` and the exact diagonal ``(..., d)``.

    ``F ~ U L U^T + E``. ``U L U^T`` is the Nystrom approximation ``Y (Omega^T Y)^+ Y^T`` (Tropp et al., 2017,
    arXiv 1706.05736). The diagonal matrix E holds the rest of the diagonal.
    """

    fields = ("sketch", "diagonal")
    columns = 32

    @staticmethod
    def shapes(width: int) -> tuple[tuple[int, ...], ...]:
        return ((width, min(LowRank.columns, width)), (width,))

    @staticmethod
    def sums(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        rows = rows.to(dtype)
        return rows.mT @ (rows @ _test_matrix(rows.shape[-1], rows)), squares(rows, dtype)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return orthonormal U ``(..., d, k)``, eigenvalues L ``(..., k)`` and the residual diagonal E ``(..., d)``."""
        sketch, diagonal = self.tensors
        omega = _test_matrix(sketch.shape[-2], sketch)
        # The shift keeps the Cholesky factor finite. It is subtracted from the eigenvalues below.
        norm = torch.linalg.matrix_norm(sketch)[..., None, None]
        shift = 8 * torch.finfo(sketch.dtype).eps * norm
        shifted = sketch + shift * omega
        core = omega.mT @ shifted
        root, failed = torch.linalg.cholesky_ex(0.5 * (core + core.mT))
        # Without statistics, or if the factorization fails, the diagonal alone represents F.
        usable = (failed[..., None, None] == 0) & (norm > torch.finfo(sketch.dtype).tiny)
        root = torch.where(usable, root, torch.eye(root.shape[-1], dtype=root.dtype, device=root.device))
        shifted = torch.where(usable, shifted, 0)
        half = torch.linalg.solve_triangular(root, shifted.mT, upper=False).mT
        u, singular, _ = torch.linalg.svd(half, full_matrices=False)
        values = torch.where(usable.squeeze(-1), (singular.square() - shift.squeeze(-1)).clamp_min(0), 0)
        residual = (diagonal - (u.square() * values.unsqueeze(-2)).sum(-1)).clamp_min(0)
        return u, values, residual

    def matmul(self, x: Tensor) -> Tensor:
        u, values, residual = self._parts()
        return u @ (values.unsqueeze(-1) * (u.mT @ x)) + residual.unsqueeze(-1) * x

    def whitener(self, damping: float) -> tuple[Tensor, ...]:
        u, values, residual = self._parts()
        noise = residual + damping * self.tensors[1].mean(-1, keepdim=True)
        scale = safe_rsqrt(noise)
        # W is (E + U L U^T)^-1/2 up to a rotation: scale by E^-1/2, then shrink k directions of the scaled matrix.
        w, singular, _ = torch.linalg.svd(scale.unsqueeze(-1) * u * values.sqrt().unsqueeze(-2), full_matrices=False)
        return scale, w, (1 + singular.square()).rsqrt() - 1

    @staticmethod
    def whiten(whitener: Tensor | tuple[Tensor, ...], x: Tensor, transpose: bool = False) -> Tensor:
        scale, w, shrink = whitener
        x = x if transpose else scale.unsqueeze(-1) * x
        x = x + w @ (shrink.unsqueeze(-1) * (w.mT @ x))
        return scale.unsqueeze(-1) * x if transpose else x

    def to_dense(self) -> Tensor:
        u, values, residual = self._parts()
        return (u * values.unsqueeze(-2)) @ u.mT + torch.diag_embed(residual)


def _test_matrix(width: int, like: Tensor) -> Tensor:
    """Return a Gaussian ``(d, k)`` that is equal in every process and every run, so that it is never stored."""
    generator = torch.Generator().manual_seed(width)
    shape = width, min(LowRank.columns, width)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(like)
