"""The whitener P of retained text: coordinates in which an adapter changes the predictions on this text less.

Notation: ``C`` (d, d) is the second moment E[x x^T] of a layer's input x over retained text, and ``m`` is its mean
eigenvalue. ``P = c (C + eps m I)^(-p)``, with c such that ``tr(P C P) = tr(C)``. The adapter learns A' in ``A = A' P``.
P makes steps small along input directions that are strong on retained text.

C is stored in low-rank form: its k largest eigenpairs, and the mean of the other eigenvalues. This gives
``P = a I + U diag(w) U^T``, and a product with P costs two thin products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POWER = 0.5  # p: 0 does not change the coordinates, 1/2 whitens
DAMPING = 0.03  # eps, relative to the mean eigenvalue
RANK = 16  # k, the number of eigenpairs to keep


@dataclass(frozen=True, eq=False)
class Metric:
    """The matrix ``P = a I + U diag(w) U^T``, symmetric positive definite; leading dimensions are layers.

    Attributes:
        base: a, ``(...)``.
        weights: w, ``(..., k)``; ``a + w`` are the eigenvalues of P along U.
        vectors: U, ``(..., d, k)``, orthonormal columns.
    """

    base: Tensor
    weights: Tensor
    vectors: Tensor

    @property
    def width(self) -> int:
        """d, the number of the layer's input features."""
        return self.vectors.shape[-2]

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x P`` for x ``(..., r, d)``, in the dtype of x."""
        along = (x @ self.vectors.to(x)) * self.weights.to(x).unsqueeze(-2)
        return self.base.to(x)[..., None, None] * x + along @ self.vectors.to(x).mT

    def solve(self, x: Tensor) -> Tensor:
        """Return ``x P^-1`` for x ``(..., r, d)``, in the dtype of x."""
        inverse = 1 / self.base
        return Metric(
            inverse, 1 / (self.base.unsqueeze(-1) + self.weights) - inverse.unsqueeze(-1), self.vectors
        ).apply(x)

    def to_dense(self) -> Tensor:
        """Return P, ``(..., d, d)``."""
        eye = torch.eye(self.width, dtype=self.vectors.dtype, device=self.vectors.device)
        return self.apply(eye.expand(*self.base.shape, -1, -1))

    @staticmethod
    def stack(metrics: Sequence[Metric]) -> Metric:
        """Return metrics of equal d and k as one metric with a new leading dimension."""
        fields = ([m.base for m in metrics], [m.weights for m in metrics], [m.vectors for m in metrics])
        return Metric(*(torch.stack(tensors) for tensors in fields))


def metric_of(values: Tensor, vectors: Tensor, rest: Tensor, power: float = POWER, damping: float = DAMPING) -> Metric:
    """Return the whitener P of a second moment in low-rank form; the identity if the second moment is zero.

    The trace identity also holds for the full second moment, since P is a multiple of I outside of the span of U.

    Args:
        values: the k largest eigenvalues, ``(..., k)``.
        vectors: their eigenvectors in columns, ``(..., d, k)``.
        rest: mean of the other d - k eigenvalues, ``(...)``; 0 if k = d.
        power: p.
        damping: eps.
    """
    width, rank = vectors.shape[-2:]
    values, rest = values.clamp_min(0), rest.clamp_min(0)
    if rank == width:  # No other direction exists, so any value is right; this one keeps rounding errors small.
        rest = values.amin(-1)
    others = width - rank
    trace = values.sum(-1) + others * rest
    shift = damping * trace / width
    seen = trace > 0
    shift = torch.where(seen, shift, 1.0)  # zero second moment: all factors are equal, and c makes them 1
    along = (values + shift.unsqueeze(-1)) ** -power
    beyond = (rest + shift) ** -power
    passed = (values * along.square()).sum(-1) + others * rest * beyond.square()
    scale = torch.where(seen, (trace / torch.where(seen, passed, 1.0)).sqrt(), 1.0)
    base = scale * beyond
    return Metric(base, scale.unsqueeze(-1) * along - base.unsqueeze(-1), vectors)
