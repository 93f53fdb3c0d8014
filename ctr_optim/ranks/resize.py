"""Change a pair's rank: the function goes on, and so does the optimizer.

A shrink keeps a subspace: ``A <- N A``, ``B <- B M`` with ``M N`` the Fisher-orthogonal projector on the best
directions. N has orthonormal rows, so that A keeps its scale. Gradients follow as ``g_A <- M^T g_A``,
``g_B <- g_B N^T``, and so do first moments, exactly; factors as ``H <- N H N^T``, ``D <- M^T D M``. Growth appends rows
to A and zero columns to B: the function is unchanged, and the new columns' first gradient points where the loss falls.

What is r x r is worked out on the host, in float64; what is wide then moves by one product a side (:func:`carry`), and
nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ctr_optim.linalg.eigen import eigenbasis, padded_basis
from ctr_optim.linalg.shapes import sized
from ctr_optim.ranks.valuation import Existing

State = dict[str, Tensor]


@dataclass(frozen=True)
class Core:
    """The ``(..., r, r)`` part of layers' states: H, D, and the bases that the moments of A and of B are in."""

    H: Tensor
    D: Tensor
    basis_a: Tensor
    basis_b: Tensor


@dataclass(frozen=True)
class Projection:
    """N ``(..., e, r)`` with orthonormal rows, and M ``(..., r, e)``, with ``N M = I``."""

    keep: Tensor
    restore: Tensor


def projection(existing: Existing, count: int) -> Projection:
    """The projection on each layer's ``count`` best directions."""
    rows = existing.keep[..., :count, :]
    q, triangle = torch.linalg.qr(rows.mT)  # rows = triangle^T q^T
    return Projection(q.mT, existing.restore[..., :count] @ triangle.mT)


def shrink(core: Core, on: Projection) -> tuple[Core, list[Tensor]]:
    """What is left of a core, and ``(..., 3, e, r)`` maps of weights and of both moments, for A and for ``B^T``.

    Moments go to the eigenbasis of the new factor; second moments as in a change of basis, ``v <- (R o R) v``.
    """
    n, m = on.keep, on.restore
    h, d = n @ core.H @ n.mT, m.mT @ core.D @ m
    h, d = 0.5 * (h + h.mT), 0.5 * (d + d.mT)
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device).expand_as(h)
    bases = eigenbasis(d, eye), eigenbasis(h, eye)
    turns = bases[0].mT @ m.mT @ core.basis_a, bases[1].mT @ n @ core.basis_b
    maps = [torch.stack([move, turn, turn.square()], -3) for move, turn in zip((n, m.mT), turns, strict=True)]
    return Core(h, d, *bases), maps


def unchanged(core: Core) -> tuple[Core, list[Tensor]]:
    """Return the result of :func:`shrink` for layers that keep every direction."""
    *layers, rank, _ = core.H.shape
    eye = torch.eye(rank, dtype=core.H.dtype, device=core.H.device).expand(*layers, 3, -1, -1)
    return core, [eye, eye]


def grow(core: Core, cross: Tensor, inner: Tensor) -> Core:
    """A core with k new directions, of which B has nothing yet; they are their own basis.

    Args:
        cross: ``A C rows^T (..., r, k)``; inner: ``rows C rows^T (..., k, k)``: what H becomes.
    """
    H = torch.cat([torch.cat([core.H, cross], -1), torch.cat([cross.mT, inner], -1)], -2)
    return padded(replace(core, H=H), H.shape[-1])


def padded(core: Core, room: int) -> Core:
    """Return a core enlarged to ``room``; the added directions have no factors and are their own basis."""
    factors = sized(core.H, (-2, -1), room), sized(core.D, (-2, -1), room)
    return Core(*factors, padded_basis(core.basis_a, room), padded_basis(core.basis_b, room))


def carry(old: Tensor, maps: Tensor, new: Tensor, room: int) -> Tensor:
    """Weights and moments of one side after a resize, ``(..., n, room, d)`` in float64.

    Args:
        old: ``(..., n, r, d)``: the weights, and both moments where there are any.
        maps: ``(..., 3, e, r)`` for the directions that are kept.
        new: ``(..., n, k, d)``: what new directions start with.
    """
    kept = maps[..., : old.shape[-3], :, :].to(old.device, non_blocking=True) @ old.double()
    return sized(torch.cat([kept, new.to(kept)], -2), (-2,), room)
