"""The K-FAC quadratic form of a step, batched over layers of one shape."""

from __future__ import annotations

from torch import Tensor

from ctr_optim.curvature.factors import Factor
from ctr_optim.linalg.products import combine, long_product


def quadratic(
    delta_a: Tensor | None, delta_b: Tensor | None, a: Tensor, b: Tensor, H: Tensor, D: Tensor, C: Factor, S: Factor
) -> Tensor:
    """The K-FAC quadratic form of a step, one number a layer.

    ``<dA, D dA C> + <dB, S dB H> + 2 <S B dA C A^T, dB>``, all of one layer's A and B together.

    Args:
        delta_a, delta_b: steps of A ``(L, r, d_in)`` and B ``(L, d_out, r)``; None for one that stays.
        a, b: the weights themselves.
        H, D: rank factors ``(L, r, r)``; C, S: wide factors, S with s^2 in it.

    Returns:
        ``(L,)``, never negative. D and H are exact and C and S are not, so that the cross term is held within the
        Cauchy-Schwarz bound of its two squares: the form stays positive semi-definite.
    """
    square_a = square_b = cross = H.new_zeros(H.shape[:-2])
    if delta_a is not None:
        a_in = C.matmul(delta_a.mT).mT  # (L, r, d_in)
        square_a = (D @ delta_a).mul_(a_in).sum((-2, -1))
    if delta_b is not None:
        b_out = S.matmul(delta_b)  # (L, d_out, r)
        square_b = (delta_b @ H).mul_(b_out).sum((-2, -1))
    if delta_a is not None and delta_b is not None:
        # <dB^T S B, A C dA^T>: not by a product of A with C dA^T, which would be all sum and no matrix
        cross = (long_product(b_out, b).mT @ a).mul_(a_in).sum((-2, -1))
    return combine(square_a, square_b, cross)


def penalty_gradients(a: Tensor, b: Tensor, H: Tensor, D: Tensor, C: Factor, S: Factor) -> tuple[Tensor, Tensor]:
    """Gradients of the cumulative penalty ``sum tr(D H) = |S^1/2 B A C^1/2|^2``: ``2 D A C`` and ``2 S B H``."""
    return 2 * C.matmul((D @ a).mT).mT, 2 * S.matmul(b @ H)
