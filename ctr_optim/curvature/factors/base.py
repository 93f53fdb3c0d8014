"""The least that a structured second moment must implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor


class Factor(ABC):
    """A symmetric positive semi-definite matrix of shape ``(..., d, d)``, held in some structure.

    Attributes:
        fields: names of the tensors that hold the matrix; the optimizer's state is keyed by them.
        is_diagonal: whether the only tensor is the diagonal, by which Triton kernels then multiply in place of
            :meth:`matmul`.
    """

    fields: ClassVar[tuple[str, ...]]
    is_diagonal: ClassVar[bool] = False

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __getitem__(self, index: int | Tensor) -> Factor:
        """The factor of one layer, sharing memory; or of some."""
        return type(self)(*(t[index] for t in self.tensors))

    @staticmethod
    @abstractmethod
    def shapes(width: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the fields for one layer of width d."""

    @staticmethod
    @abstractmethod
    def sums(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the fields of ``sum_t v_t v_t^T`` for rows v_t ``(..., n, d)``, summed in ``dtype``."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """Return ``F x`` for x ``(..., d, n)``."""

    @abstractmethod
    def whitener(self, damping: float) -> Tensor | tuple[Tensor, ...]:
        """Return the tensors that :meth:`whiten` needs; ``damping`` is relative to the mean eigenvalue."""

    @staticmethod
    @abstractmethod
    def whiten(whitener: Tensor | tuple[Tensor, ...], x: Tensor, transpose: bool = False) -> Tensor:
        """Return ``W x`` (or ``W^T x``) with ``W F W^T = I``, F damped, for x ``(..., d, n)``."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return the matrix, ``(..., d, d)``."""


def of_layers(whitener: Any, index: Any) -> Any:
    """Return the part of a stack's whitener that belongs to one layer, or to several."""
    return whitener[index] if isinstance(whitener, Tensor) else tuple(w[index] for w in whitener)


def squares(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of squares over rows ``(..., n, d)``: in one pass, nothing as large as the rows is written."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-2, dtype=dtype)
    return norms.square()


def safe_rsqrt(x: Tensor) -> Tensor:
    """``x^-1/2``, and 0 where x is 0: a direction never seen is not amplified."""
    return torch.where(x > 0, x.clamp_min(torch.finfo(x.dtype).tiny).rsqrt(), 0)
