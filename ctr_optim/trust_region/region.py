"""The trust region: how far a step moves the model's predictions, and how far it may.

The Kullback-Leibler divergence per token between the model before and after a step Delta is, to second order,
``Delta^T F Delta / 2`` with F the Fisher matrix. K-FAC's block-diagonal F gives the right *shape* cheaply; its
*scale* leaves out that layers and tokens move together. One number, the coupling kappa, restores it:
``KL ~ kappa q / 2``. It is measured on the model itself now and then (see ``calibration.py``); from one step to the
next it follows the loss's slope along the step (:func:`alignment`), which costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctr_optim.curvature.factors import Factor


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


def combine(square_a: Tensor, square_b: Tensor, cross: Tensor) -> Tensor:
    """The form from its terms: never negative, the cross term within the Cauchy-Schwarz bound of the squares."""
    square_a, square_b = square_a.clamp_min(0), square_b.clamp_min(0)
    limit = (square_a * square_b).sqrt()
    return square_a + square_b + 2 * cross.clamp(-limit, limit)


def long_product(x: Tensor, y: Tensor) -> Tensor:
    """``x^T y`` for ``(L, d, r)`` of d much larger than r: in parts, which a device adds up all at once."""
    parts = next((n for n in (32, 16, 8) if x.shape[-2] % n == 0 and x.shape[-2] >= 64 * n), 1)
    x, y = (t.reshape(*t.shape[:-2], parts, -1, t.shape[-1]) for t in (x, y))
    return (x.mT @ y).sum(-3)


def penalty_gradients(a: Tensor, b: Tensor, H: Tensor, D: Tensor, C: Factor, S: Factor) -> tuple[Tensor, Tensor]:
    """Gradients of the cumulative penalty ``sum tr(D H) = |S^1/2 B A C^1/2|^2``: ``2 D A C`` and ``2 S B H``."""
    return 2 * C.matmul((D @ a).mT).mT, 2 * S.matmul(b @ H)


SLOPE_EXPONENT = 0.6  # of slope^2 in the prediction; q has the rest


def alignment(slope: Tensor, q: Tensor, typical: float | Tensor) -> Tensor:
    """``()`` how much larger than usual a step's KL is for its K-FAC form, from the loss's slope along the step.

    Layers and tokens that lower the loss together move the predictions together: from one step to the next, the KL
    follows ``q^0.4 slope^1.2`` far better than q alone, and kappa drifts less, too (benchmarks/README.md). The
    ratio of ``slope^2 / q`` to its usual value counts within a factor of 9: a step along which the loss is level moves
    the predictions, too.

    Args:
        slope: ``()`` inner product of gradient and step.
        q: ``()`` the step's K-FAC form.
        typical: the usual ``slope^2 / q``.
    """
    ratio = slope.square() / (q * typical).clamp_min(torch.finfo(q.dtype).tiny)
    return ratio.clamp(1 / 9, 9) ** SLOPE_EXPONENT


def scale_within(predicted_kl: Tensor, bound: float | Tensor) -> Tensor:
    """``()`` the factor in [0, 1] that brings a step's predicted KL (quadratic in its length) within ``bound``.

    Exactly 1 where the bound holds already, so that an inactive constraint changes no bit of the step; 0 where nothing
    can be predicted (NaN).
    """
    inside = predicted_kl <= bound
    shrink = (bound / predicted_kl.clamp_min(torch.finfo(predicted_kl.dtype).tiny)).sqrt()
    return torch.where(inside, 1.0, shrink.clamp_max(1.0).nan_to_num(0.0))


def adapted_bound(bound: float, initial: float, actual: float, predicted: float) -> float:
    """Levenberg-Marquardt's rule on the ratio of actual to predicted reduction of the loss.

    Above 3/4 the quadratic model is good and the bound grows by half; below 1/4 it is poor and the bound halves. It
    stays within a factor of 100 of where it began.
    """
    ratio = actual / predicted if predicted > 0 else 0.0
    if ratio > 0.75:
        bound *= 1.5
    elif not ratio >= 0.25:
        bound *= 0.5
    return min(max(bound, initial / 100), initial * 100)
