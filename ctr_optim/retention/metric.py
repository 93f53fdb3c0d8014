"""The whitener P of retained text: the coordinates in which an adapter learns without forgetting.

Notation: ``C`` (d, d) is the second moment E[x x^T] of a layer's input x over retained text, ``m`` its mean eigenvalue,
and ``P = c (C + eps m I)^(-p)`` with c such that ``tr(P C P) = tr(C)``. The adapter reads its input through P, as
``A = A' P``, so that directions which retained text uses strongly become expensive.

C is held in low-rank form: its k largest eigenpairs, and the mean of the other eigenvalues. P then is
``a I + U diag(w) U^T``, and a product with P costs two thin products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POWER = 0.5  # p: 0 leaves the coordinates alone, 1/2 whitens
DAMPING = 0.03  # eps, relative to the mean eigenvalue
RANK = 16  # k: eigenpairs that are kept


@dataclass(frozen=True, eq=False)
class Metric:
    """``P = a I + U diag(w) U^T``, symmetric positive definite; any number of leading dimensions, one layer each.

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
        """d, the layer's input features."""
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
        """Return metrics of one width and k as one, with a new leading dimension."""
        fields = ([m.base for m in metrics], [m.weights for m in metrics], [m.vectors for m in metrics])
        return Metric(*(torch.stack(tensors) for tensors in fields))


def metric_of(values: Tensor, vectors: Tensor, rest: Tensor, power: float = POWER, damping: float = DAMPING) -> Metric:
    """Return P of a second moment in low-rank form.

    Args:
        values: k largest eigenvalues, ``(..., k)``.
        vectors: their eigenvectors in columns, ``(..., d, k)``.
        rest: mean of the other d - k eigenvalues, ``(...)``; 0 where k = d.
        power, damping: p and eps.

    The trace identity holds for the second moment itself, too: P treats the space beyond U alike in every direction.
    A second moment of zero gives the identity.
    """
    width, rank = vectors.shape[-2:]
    values, rest = values.clamp_min(0), rest.clamp_min(0)
    if rank == width:  # no direction is left: any positive number serves, and this one rounds least
        rest = values.amin(-1)
    others = width - rank
    trace = values.sum(-1) + others * rest
    shift = damping * trace / width
    seen = trace > 0
    shift = torch.where(seen, shift, 1.0)  # of nothing: every factor is one number, and c makes it 1
    along = (values + shift.unsqueeze(-1)) ** -power
    beyond = (rest + shift) ** -power
    passed = (values * along.square()).sum(-1) + others * rest * beyond.square()
    scale = torch.where(seen, (trace / torch.where(seen, passed, 1.0)).sqrt(), 1.0)
    base = scale * beyond
    return Metric(base, scale.unsqueeze(-1) * along - base.unsqueeze(-1), vectors)
