"""The K-FAC quadratic form of a step, batched over layers of one shape."""

from __future__ import annotations

from torch import Tensor

from ctr_optim.curvature.factors import Factor
from ctr_optim.linalg.products import combine, long_product


def quadratic(
    delta_a: Tensor | None, delta_b: Tensor | None, a: Tensor, b: Tensor, H: Tensor, D: Tensor, C: Factor, S: Factor
) -> Tensor:
    """Return the K-FAC quadratic form of a step for each layer.

    The form is ``<dA, D dA C> + <dB, S dB H> + 2 <S B dA C A^T, dB>``: two squares and the cross term of A and B.

    Args:
        delta_a, delta_b: steps of A ``(L, r, d_in)`` and B ``(L, d_out, r)``; None for a weight that does not move.
        a, b: weights A ``(L, r, d_in)`` and B ``(L, d_out, r)``.
        H, D: rank factors ``(L, r, r)``.
        C, S: wide factors; S contains s^2.

    Returns:
        ``(L,)``, never negative. C and S are approximations while D and H are full matrices. Therefore the cross term
        is clamped to the Cauchy-Schwarz bound of the two squares.
    """
    square_a = square_b = cross = H.new_zeros(H.shape[:-2])
    if delta_a is not None:
        a_in = C.matmul(delta_a.mT).mT  # (L, r, d_in)
        square_a = (D @ delta_a).mul_(a_in).sum((-2, -1))
    if delta_b is not None:
        b_out = S.matmul(delta_b)  # (L, d_out, r)
        square_b = (delta_b @ H).mul_(b_out).sum((-2, -1))
    if delta_a is not None and delta_b is not None:
        # The cross term equals <B^T S dB A, dA C>. Forming A C dA^T instead would need a slow reduction over d_in.
        cross = (long_product(b_out, b).mT @ a).mul_(a_in).sum((-2, -1))
    return combine(square_a, square_b, cross)


def penalty_gradients(a: Tensor, b: Tensor, H: Tensor, D: Tensor, C: Factor, S: Factor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the penalty ``sum tr(D H) = |S^1/2 B A C^1/2|^2`` with respect to A and B.

    Args:
        a, b: weights A ``(L, r, d_in)`` and B ``(L, d_out, r)``.
        H, D: rank factors ``(L, r, r)``.
        C, S: wide factors; S contains s^2.

    Returns:
        ``2 D A C (L, r, d_in)`` and ``2 S B H (L, d_out, r)``.
    """
    return 2 * C.matmul((D @ a).mT).mT, 2 * S.matmul(b @ H)
