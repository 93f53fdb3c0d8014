"""Coordinates in which A learns: ``A = A' P`` with ``P = a I + U diag(w) U^T``, symmetric, from retained text.

The gradient in A' is ``g_A P``, and a step of A' moves A by ``Delta_A' P``; each is two thin products. P acts on the
input dimension of A and a rank change acts on the rank dimension, so the two commute. The optimizer's state of A holds
P as two tensors, so that checkpoints contain it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

VECTORS, SCALES = "retain_vectors", "retain_scales"  # keys in the state of A: U^T (k, d), and (a, w) (k + 1,)


def product(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Return ``x P`` for x ``(..., r, d)``.

    Args:
        x: rows to multiply.
        state: P as :data:`VECTORS` ``(..., k, d)`` and :data:`SCALES` ``(..., k + 1)``; leading dimensions are layers.
    """
    return _product(x, state[SCALES][..., :1], state[SCALES][..., 1:], state[VECTORS])


def solve(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Return ``x P^-1`` for x ``(..., r, d)``; ``state`` as in :func:`product`."""
    base, weights = state[SCALES][..., :1], state[SCALES][..., 1:]
    return _product(x, 1 / base, 1 / (base + weights) - 1 / base, state[VECTORS])


def empty(like: Tensor, columns: int) -> dict[str, Tensor]:
    """Return zeros in the shapes that the state of A has for ``columns`` eigenpairs.

    Args:
        like: an A, ``(r, d)``; gives d, the device, and the dtype (at least float32).
        columns: k, the number of eigenpairs.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    vectors = torch.zeros(columns, like.shape[1], dtype=dtype, device=like.device)
    return {VECTORS: vectors, SCALES: torch.zeros(columns + 1, dtype=dtype, device=like.device)}


def _product(x: Tensor, base: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
    along = (x @ vectors.mT) * weights.unsqueeze(-2)
    return base.unsqueeze(-1) * x + along @ vectors
