"""Structured estimates of a second moment E[v v^T] of width d.

K-FAC (Martens & Grosse, 2015, arXiv 1503.05671) writes a layer's Fisher matrix as ``C (x) S``, with C the second
moment of its inputs and S that of the gradients at its outputs. Both are wide; three structures hold them:

=============  ==========================  =========================================
``Diagonal``   d numbers                   the default: calibrated, the metric needs no more
``LowRank``    d (k + 1) numbers           Nystrom sketch of k columns, plus the diagonal that it misses
``Dense``      d^2 numbers                 small layers, and the oracle of the tests
=============  ==========================  =========================================

Every structure is *linear* in v v^T: sums over tokens, layers and processes, and moving averages, act on its
tensors directly. All tensors carry any number of leading batch dimensions (one layer each).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]


class Factor(ABC):
    """A symmetric positive semi-definite matrix of shape ``(..., d, d)``, held in some structure."""

    fields: tuple[str, ...]

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __getitem__(self, index: int | Tensor) -> Factor:
        """The factor of one layer, sharing memory; or of some."""
        return type(self)(*(t[index] for t in self.tensors))

    @staticmethod
    @abstractmethod
    def shapes(width: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the fields of one layer of width d."""

    @staticmethod
    @abstractmethod
    def sums(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The fields of ``sum_t v_t v_t^T`` for rows v_t ``(..., n, d)``, summed in ``dtype``."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """``F x`` for x ``(..., d, n)``."""

    @abstractmethod
    def whitener(self, damping: float) -> Tensor | tuple[Tensor, ...]:
        """What :meth:`whiten` needs, computed once; damping is relative to the mean eigenvalue."""

    @staticmethod
    @abstractmethod
    def whiten(whitener: Tensor | tuple[Tensor, ...], x: Tensor, transpose: bool = False) -> Tensor:
        """``W x`` (or ``W^T x``) with ``W F W^T = I``, F damped, for x ``(..., d, n)``."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The matrix, ``(..., d, d)``."""


class Diagonal(Factor):
    """Only the diagonal: ``(..., d)``."""

    fields = ("diagonal",)

    @staticmethod
    def shapes(width: int) -> tuple[tuple[int, ...], ...]:
        return ((width,),)

    @staticmethod
    def sums(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (_squares(rows, dtype),)

    def matmul(self, x: Tensor) -> Tensor:
        return self.tensors[0].unsqueeze(-1) * x

    def whitener(self, damping: float) -> Tensor:
        (diagonal,) = self.tensors
        return _safe_rsqrt(diagonal + damping * diagonal.mean(-1, keepdim=True))

    @staticmethod
    def whiten(whitener: Tensor | tuple[Tensor, ...], x: Tensor, transpose: bool = False) -> Tensor:
        assert isinstance(whitener, Tensor)
        return whitener.unsqueeze(-1) * x

    def to_dense(self) -> Tensor:
        return torch.diag_embed(self.tensors[0])


class Dense(Factor):
    """The whole matrix: ``(..., d, d)``."""

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
        except LinAlgError:  # the diagonal alone whitens, if not as well
            eigenvalues = matrix.diagonal(dim1=-2, dim2=-1)
            vectors = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        eigenvalues = eigenvalues.clamp_min(0)
        roots = _safe_rsqrt(eigenvalues + damping * eigenvalues.mean(-1, keepdim=True))
        root: Tensor = (vectors * roots.unsqueeze(-2)) @ vectors.mT
        return root

    @staticmethod
    def whiten(whitener: Tensor | tuple[Tensor, ...], x: Tensor, transpose: bool = False) -> Tensor:
        assert isinstance(whitener, Tensor)
        return whitener @ x

    def to_dense(self) -> Tensor:
        return self.tensors[0]


class LowRank(Factor):
    """Nystrom sketch ``Y = F Omega`` of k columns, and the exact diagonal.

    ``F ~ U L U^T + E``: the Nystrom approximation ``Y (Omega^T Y)^+ Y^T`` (Tropp et al., 2017, arXiv 1706.05736)
    plus the part of the diagonal that it leaves out.
    """

    fields = ("sketch", "diagonal")
    columns = 32

    @staticmethod
    def shapes(width: int) -> tuple[tuple[int, ...], ...]:
        return ((width, min(LowRank.columns, width)), (width,))

    @staticmethod
    def sums(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        rows = rows.to(dtype)
        return rows.mT @ (rows @ _test_matrix(rows.shape[-1], rows)), _squares(rows, dtype)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal U ``(..., d, k)``, eigenvalues ``(..., k)``, residual diagonal ``(..., d)``."""
        sketch, diagonal = self.tensors
        omega = _test_matrix(sketch.shape[-2], sketch)
        # the shift keeps the Cholesky factor finite; it is taken back from the eigenvalues
        norm = torch.linalg.matrix_norm(sketch)[..., None, None]
        shift = 8 * torch.finfo(sketch.dtype).eps * norm
        shifted = sketch + shift * omega
        core = omega.mT @ shifted
        root, failed = torch.linalg.cholesky_ex(0.5 * (core + core.mT))
        # nothing seen yet, or no factorisation: the diagonal alone
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
        scale = _safe_rsqrt(noise)
        # (E + U L U^T)^-1/2 up to a rotation: E^-1/2 first, then the k directions that stand out of it
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


STRUCTURES: dict[str, type[Factor]] = {"diagonal": Diagonal, "lowrank": LowRank, "dense": Dense}


def _squares(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of squares over rows ``(..., n, d)``: in one pass, nothing as large as the rows is written."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-2, dtype=dtype)
    return norms.square()


def _safe_rsqrt(x: Tensor) -> Tensor:
    """``x^-1/2``, and 0 where x is 0: a direction never seen is not amplified."""
    return torch.where(x > 0, x.clamp_min(torch.finfo(x.dtype).tiny).rsqrt(), 0)


def _test_matrix(width: int, like: Tensor) -> Tensor:
    """The same Gaussian ``(d, k)`` on every process and in every run; never stored."""
    generator = torch.Generator().manual_seed(width)
    shape = width, min(LowRank.columns, width)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(like)
