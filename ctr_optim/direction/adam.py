"""Adam in an orthonormal basis, batched over parameters of one shape.

A's Fisher block is ``C (x) D``, B's is ``H (x) S``. Adam runs in the eigenbasis of the small, exact factor (D for A,
H for B), as EKFAC (George et al., 2018, arXiv 1806.03884) and SOAP (Vyas et al., 2024, arXiv 2409.11321) do for
whole weight matrices. With identity bases it is torch's AdamW.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, basis: Tensor, rank_dim: int) -> Tensor:
    """Coordinates of x in ``basis`` (columns), along its rank dimension: -2 for A ``(r, d)``, -1 for B ``(d, r)``."""
    return basis.mT @ x if rank_dim == -2 else x @ basis


def unrotate(x: Tensor, basis: Tensor, rank_dim: int) -> Tensor:
    """Inverse of :func:`rotate` for orthonormal bases."""
    return basis @ x if rank_dim == -2 else x @ basis.mT


def adam_(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    live: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Update the moments in place and return Adam's direction ``m^ / (sqrt(v^) + eps)`` (Kingma & Ba, 2015).

    Args:
        grad, exp_avg, exp_avg_sq: ``(L, *shape)``; ``grad`` is used up.
        step: ``(L,)`` number of updates so far, advanced here.
        live: ``(L,)`` of 0 and 1. Where 0, nothing changes: no gradient this time, or one that is not finite.

    Returns:
        ``m / (sqrt(v) + eps c)`` of the gradient's shape, and ``(L, 1, ...)`` factors that it is still to be multiplied
        by: both bias corrections, and 0 where not live. The caller has a place where that costs nothing.
    """
    step += live
    wide = (-1,) + (1,) * (grad.dim() - 1)
    on = live.view(wide).to(grad.dtype)
    exp_avg.lerp_(grad, (1 - betas[0]) * on)
    grad *= ((1 - betas[1]) ** 0.5) * on
    exp_avg_sq.mul_(betas[1] ** on).addcmul_(grad, grad)
    count = step.double().clamp_min(1).view(wide)
    correction1 = 1 - betas[0] ** count
    correction2 = (1 - betas[1] ** count).sqrt_()
    denominator = torch.sqrt(exp_avg_sq, out=grad).add_((eps * correction2).to(grad.dtype))
    return torch.div(exp_avg, denominator, out=denominator), (correction2 / correction1).to(grad.dtype) * on


def change_basis_(exp_avg: Tensor, exp_avg_sq: Tensor, old: Tensor, new: Tensor, rank_dim: int) -> None:
    """Carry the moments from one orthonormal basis to another, in place.

    First moments move exactly, ``m <- R m`` with ``R = new^T old``; second moments as ``v <- (R o R) v``, exact for
    independent coordinates and for permutations.
    """
    turn = (new.mT @ old).mT
    exp_avg.copy_(rotate(exp_avg, turn, rank_dim))
    exp_avg_sq.copy_(rotate(exp_avg_sq, turn.square(), rank_dim))
