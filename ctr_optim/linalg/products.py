"""Products of tall matrices, and the sum of a quadratic form's terms."""

from __future__ import annotations

from torch import Tensor


def combine(square_a: Tensor, square_b: Tensor, cross: Tensor) -> Tensor:
    """Return ``(L,)`` the quadratic form ``a + b + 2 c`` of two squares and a cross term, ``(L,)`` each.

    The squares are clamped to at least 0, and the cross term to the Cauchy-Schwarz bound of the squares. Therefore the
    form is never negative.
    """
    square_a, square_b = square_a.clamp_min(0), square_b.clamp_min(0)
    limit = (square_a * square_b).sqrt()
    return square_a + square_b + 2 * cross.clamp(-limit, limit)


def long_product(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x^T y`` for x and y ``(L, d, r)`` with d much larger than r.

    The product is split along d (split-K), so that the reduction runs in parallel.
    """
    parts = next((n for n in (32, 16, 8) if x.shape[-2] % n == 0 and x.shape[-2] >= 64 * n), 1)
    x, y = (t.reshape(*t.shape[:-2], parts, -1, t.shape[-1]) for t in (x, y))
    return (x.mT @ y).sum(-3)
