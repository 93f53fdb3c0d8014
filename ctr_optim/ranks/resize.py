"""Change the rank of layers, with their weights, moments and factors.

A shrink keeps a subspace: ``A <- N A``, ``B <- B M``, where ``M N`` is the Fisher-orthogonal projector on the best
directions. N has orthonormal rows, so A keeps its scale. Gradients transform as ``g_A <- M^T g_A`` and
``g_B <- g_B N^T``; first moments transform in the same way, exactly. Factors become ``H <- N H N^T`` and
``D <- M^T D M``. Growth appends rows to A and zero columns to B, so the layer's output does not change. The new
columns of B get a gradient in the next step.

All r x r matrices are computed in float64 on the CPU. One product a side then moves the wide tensors (:func:`carry`),
without waiting for the device.
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
    """The ``(..., r, r)`` matrices of layers: factors H and D, and the bases of the moments of A and of B."""

    H: Tensor
    D: Tensor
    basis_a: Tensor
    basis_b: Tensor


@dataclass(frozen=True)
class Projection:
    """A projection on e of r directions.

    Attributes:
        keep: N ``(..., e, r)``, with orthonormal rows.
        restore: M ``(..., r, e)``, with ``N M = I``.
    """

    keep: Tensor
    restore: Tensor


def projection(existing: Existing, count: int) -> Projection:
    """Return the projection on each layer's ``count`` best directions."""
    rows = existing.keep[..., :count, :]
    q, triangle = torch.linalg.qr(rows.mT)  # rows = triangle^T q^T
    return Projection(q.mT, existing.restore[..., :count] @ triangle.mT)


def shrink(core: Core, on: Projection) -> tuple[Core, list[Tensor]]:
    """Return the core after a projection, and the maps of weights and moments for A and for ``B^T``.

    The moments move to the eigenbases of the new factors. Second moments move as in a change of basis,
    ``v <- (R o R) v``.

    Returns:
        The core ``(..., e, e)``, and two tensors ``(..., 3, e, r)``: maps of the weights, of the first and of the
        second moments.
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
    """Return a core with k new directions, whose columns in B are zero. The bases get unit vectors for them.

    Args:
        core: the core of the r present directions.
        cross: ``A C rows^T (..., r, k)``, the off-diagonal block of the new H.
        inner: ``rows C rows^T (..., k, k)``, the new diagonal block of H.
    """
    H = torch.cat([torch.cat([core.H, cross], -1), torch.cat([cross.mT, inner], -1)], -2)
    return padded(replace(core, H=H), H.shape[-1])


def padded(core: Core, room: int) -> Core:
    """Return a core zero-padded to rank ``room``; the bases get unit vectors for the added directions."""
    factors = sized(core.H, (-2, -1), room), sized(core.D, (-2, -1), room)
    return Core(*factors, padded_basis(core.basis_a, room), padded_basis(core.basis_b, room))


def carry(old: Tensor, maps: Tensor, new: Tensor, room: int) -> Tensor:
    """Return weights and moments of A or of ``B^T`` after a resize, ``(..., n, room, d)`` in float64.

    Args:
        old: ``(..., n, r, d)``; n = 1: weights; n = 3: weights, first and second moments.
        maps: ``(..., 3, e, r)`` maps of the kept directions.
        new: ``(..., n, k, d)`` initial values of the new directions.
        room: rank after zero-padding.
    """
    kept = maps[..., : old.shape[-3], :, :].to(old.device, non_blocking=True) @ old.double()
    return sized(torch.cat([kept, new.to(kept)], -2), (-2,), room)
