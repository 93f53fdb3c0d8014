"""The abstract base class of structured second moments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor


class Factor(ABC):
    """A symmetric positive semi-definite matrix of shape ``(..., d, d)`` in structured form.

    A new structure must set ``fields`` and implement the abstract methods.

    Args:
        tensors: the fields, in order.

    Attributes:
        fields: names of the tensors that store the matrix; the optimizer's state uses them as keys.
        is_diagonal: whether the only field is the diagonal. Triton kernels then multiply by it instead of calling
            :meth:`matmul`.
    """

    fields: ClassVar[tuple[str, ...]]
    is_diagonal: ClassVar[bool] = False

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __getitem__(self, index: int | Tensor) -> Factor:
        """Return the factor of one layer (a view), or of several layers."""
        return type(self)(*(t[index] for t in self.tensors))

    @staticmethod
    @abstractmethod
    def shapes(width: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the fields for one layer of the given width d."""

    @staticmethod
    @abstractmethod
    def sums(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the fields of ``sum_t v_t v_t^T`` for rows v_t ``(..., n, d)``, summed in ``dtype``."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """Return ``F x`` for x ``(..., d, n)``."""

    @abstractmethod
    def whitener(self, damping: float) -> Tensor | tuple[Tensor, ...]:
        """Return the tensors that :meth:`whiten` needs; ``damping`` is relative to the matrix's mean eigenvalue."""

    @staticmethod
    @abstractmethod
    def whiten(whitener: Tensor | tuple[Tensor, ...], x: Tensor, transpose: bool = False) -> Tensor:
        """Return ``W x``, or ``W^T x`` with ``transpose``, for x ``(..., d, n)``; ``W F W^T = I`` for the damped F."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return the matrix ``(..., d, d)``."""


def of_layers(whitener: Any, index: Any) -> Any:
    """Return the whitener of one layer, or of several, from the whitener of a stack of layers."""
    return whitener[index] if isinstance(whitener, Tensor) else tuple(w[index] for w in whitener)


def squares(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``(..., d)`` the sum of squares over the n rows ``(..., n, d)``, accumulated in ``dtype``.

    The norm takes one pass and writes no tensor as large as the rows.
    """
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-2, dtype=dtype)
    return norms.square()


def safe_rsqrt(x: Tensor) -> Tensor:
    """Return ``x^-1/2``, and 0 where x is 0, so that directions without statistics are not amplified."""
    return torch.where(x > 0, x.clamp_min(torch.finfo(x.dtype).tiny).rsqrt(), 0)
