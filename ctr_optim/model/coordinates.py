"""Coordinates in which A learns: ``A = A' P`` with ``P = a I + U diag(w) U^T``, symmetric, from retained text.

Gradients in A' are ``g_A P``, and a step of A' moves A by ``Delta_A' P``: two thin products each. P acts on A's input
side and ranks on the other, so they commute. The state of A holds P as two tensors, by which checkpoints carry it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

VECTORS, SCALES = "retain_vectors", "retain_scales"  # U^T (k, d) and (a, w) (k + 1,) in the state of A


def product(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Return ``x P`` for x ``(..., r, d)``; P may have leading dimensions of its own, one layer each."""
    return _product(x, state[SCALES][..., :1], state[SCALES][..., 1:], state[VECTORS])


def solve(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Return ``x P^-1`` for x ``(..., r, d)``."""
    base, weights = state[SCALES][..., :1], state[SCALES][..., 1:]
    return _product(x, 1 / base, 1 / (base + weights) - 1 / base, state[VECTORS])


def empty(like: Tensor, columns: int) -> dict[str, Tensor]:
    """Return what the state of an A like this one has for ``columns`` eigenpairs."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    vectors = torch.zeros(columns, like.shape[1], dtype=dtype, device=like.device)
    return {VECTORS: vectors, SCALES: torch.zeros(columns + 1, dtype=dtype, device=like.device)}


def _product(x: Tensor, base: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
    along = (x @ vectors.mT) * weights.unsqueeze(-2)
    return base.unsqueeze(-1) * x + along @ vectors
