"""Adam in an orthonormal basis, batched over parameters of one shape.

The Fisher block of A is ``C (x) D``, and that of B is ``H (x) S``. Adam runs in the eigenbasis of the small, exact
factor: D for A, H for B. EKFAC (George et al., 2018, arXiv 1806.03884) and SOAP (Vyas et al., 2024, arXiv 2409.11321)
do the same for full weight matrices. With identity bases this is torch's AdamW.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, basis: Tensor, rank_dim: int) -> Tensor:
    """Return the coordinates of x in an orthonormal basis, along the rank dimension.

    Args:
        x: ``(..., r, d)`` for ``rank_dim=-2`` (A), ``(..., d, r)`` for ``rank_dim=-1`` (B).
        basis: ``(..., r, r)``, basis vectors in columns.
        rank_dim: -2 or -1.
    """
    return basis.mT @ x if rank_dim == -2 else x @ basis


def unrotate(x: Tensor, basis: Tensor, rank_dim: int) -> Tensor:
    """Return the inverse of :func:`rotate` for an orthonormal basis."""
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
    """Update the moments in place, and return Adam's direction ``m^ / (sqrt(v^) + eps)`` (Kingma & Ba, 2015).

    Args:
        grad, exp_avg, exp_avg_sq: ``(L, *shape)``; ``grad`` is overwritten.
        step: ``(L,)`` number of updates so far, incremented in place.
        live: ``(L,)`` of 0 and 1. An entry 0 (no gradient, or not finite) leaves the parameter's state unchanged.
        betas, eps: as in :class:`torch.optim.AdamW`.

    Returns:
        The unscaled direction ``m / (sqrt(v) + eps c) (L, *shape)``, and its factor ``(L, 1, ...)``. The direction is
        their product. The factor contains both bias corrections and ``live``. The caller can combine it with
        other factors at no cost.
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
    """Transform the moments from one orthonormal basis to another, in place.

    First moments change exactly, ``m <- R m`` with ``R = new^T old``. Second moments change as ``v <- (R o R) v``. This
    is exact for uncorrelated coordinates and for permutations.

    Args:
        exp_avg, exp_avg_sq: moments ``(L, *shape)`` in the basis ``old``.
        old, new: ``(L, r, r)``, basis vectors in columns.
        rank_dim: rank dimension of the moments: -2 for A, -1 for B.
    """
    turn = (new.mT @ old).mT
    exp_avg.copy_(rotate(exp_avg, turn, rank_dim))
    exp_avg_sq.copy_(rotate(exp_avg_sq, turn.square(), rank_dim))
