"""Change a pair's rank: the function goes on, and so does the optimizer.

A shrink keeps a subspace: ``A <- N A``, ``B <- B M`` with ``M N`` the Fisher-orthogonal projector on the best
directions. N has orthonormal rows, so that A keeps its scale. Gradients follow as ``g_A <- M^T g_A``,
``g_B <- g_B N^T``, and so do first moments, exactly; factors as ``H <- N H N^T``, ``D <- M^T D M``. Growth appends rows
to A and zero columns to B: the function is unchanged, and the new columns' first gradient points where the loss falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctr_optim.curvature.factors import eigenbasis
from ctr_optim.lora import sized
from ctr_optim.precondition import rotate
from ctr_optim.ranks.utility import Existing


@dataclass(frozen=True)
class Projection:
    """N ``(e, r)`` with orthonormal rows, and M ``(r, e)``, with ``N M = I``."""

    keep: Tensor
    restore: Tensor


def projection(existing: Existing, count: int) -> Projection:
    """The projection on a layer's ``count`` best directions."""
    rows = existing.keep[:count]
    q, triangle = torch.linalg.qr(rows.mT)  # rows = triangle^T q^T
    return Projection(q.mT, existing.restore[:, :count] @ triangle.mT)


State = dict[str, Tensor]


def shrink(a: Tensor, b: Tensor, state_a: State | None, state_b: State, on: Projection) -> tuple[Tensor, Tensor]:
    """New ``A (e, d_in)`` and ``B (d_out, e)``, in float64; the states are changed in place, in their own dtype."""
    n, m, dtype = on.keep, on.restore, state_b["rank_input"].dtype
    h = n @ state_b["rank_input"].double() @ n.mT
    d = m.mT @ state_b["rank_output"].double() @ m
    if state_a is not None:
        _transport(state_a, m.mT, d, -2)
    _transport(state_b, n, h, -1)
    state_b["rank_input"], state_b["rank_output"] = h.to(dtype), d.to(dtype)
    return n @ a.double(), b.double() @ m


def _transport(state: State, move: Tensor, factor: Tensor, rank_dim: int) -> None:
    """Moments under ``g <- move g`` (along the rank dimension), into the eigenbasis of the new factor."""
    basis = eigenbasis(0.5 * (factor + factor.mT), torch.eye(len(factor), dtype=factor.dtype, device=factor.device))
    turn = (basis.mT @ move @ state["basis"].double()).mT  # rotate() takes the transpose
    for name, by in (("exp_avg", turn), ("exp_avg_sq", turn.square())):
        state[name] = rotate(state[name].double(), by, rank_dim).to(state[name].dtype).contiguous()
    state["basis"] = basis.to(state["basis"].dtype).contiguous()


def cut(state: State, rank_dim: int, rank: int) -> State:
    """The part of a state that belongs to the first ``rank`` directions.

    Args:
        rank_dim: of the moments: 0 for A ``(r, d_in)``, 1 for B ``(d_out, r)``.
    """
    dims = {"exp_avg": (rank_dim,), "exp_avg_sq": (rank_dim,), **dict.fromkeys(_SQUARE, (0, 1))}
    return {name: sized(state[name], dims[name], rank) for name in dims if name in state}


def pad(state: State, rank_dim: int, room: int) -> State:
    """The inverse of :func:`cut`: directions not in use have no moments and no factors, and are their own basis."""
    rank, padded = state["basis"].shape[0], cut(state, rank_dim, room)
    padded["basis"].diagonal()[rank:] = 1
    return {name: t.contiguous() for name, t in padded.items()}


_SQUARE = ("basis", "rank_input", "rank_output")


def grow(
    a: Tensor,
    b: Tensor,
    states: Sequence[tuple[State | None, int, Tensor | None]],
    state_b: State,
    rows: Tensor,
    cross: Tensor,
    inner: Tensor,
) -> tuple[Tensor, Tensor]:
    """Append ``rows (k, d_in)`` to A and zero columns to B; the states are changed in place.

    Args:
        states: for A and for B, the state, its rank dimension, and the second moments that new directions start with.
        cross: ``A C rows^T (r, k)``; inner: ``rows C rows^T (k, k)``: what H becomes.

    Second moments that start at the mean of the layer's own make a first step neither wild (v = 0 late in training)
    nor lost.
    """
    k = rows.shape[0]
    h, d = state_b["rank_input"], state_b["rank_output"]
    state_b["rank_input"] = torch.cat([torch.cat([h, cross], 1), torch.cat([cross.mT, inner], 1)])
    state_b["rank_output"] = torch.block_diag(d, d.new_zeros(k, k))  # type: ignore[no-untyped-call]
    for state, dim, typical in states:
        if state is None or typical is None:
            continue
        m, v = state["exp_avg"], state["exp_avg_sq"]
        shape = list(m.shape)
        shape[dim] = k
        state["exp_avg"] = torch.cat([m, m.new_zeros(shape)], dim)
        state["exp_avg_sq"] = torch.cat([v, typical.expand(shape)], dim)
        turn = (state["basis"], torch.eye(k, dtype=m.dtype, device=m.device))
        state["basis"] = torch.block_diag(*turn)  # type: ignore[no-untyped-call]
    return torch.cat([a, rows.to(a)]), torch.cat([b, b.new_zeros(b.shape[0], k)], 1)
