"""One rank event: compute every layer's utilities, allocate the budget, and resize the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ctr_optim.curvature.base import Factored
from ctr_optim.curvature.factors.base import of_layers
from ctr_optim.model.coordinates import VECTORS, product
from ctr_optim.model.pair import LoRAPair
from ctr_optim.ranks.events import RankEvent
from ctr_optim.ranks.resize import Core, State, carry, grow, padded, projection, shrink, unchanged
from ctr_optim.ranks.scheduler import RankScheduler
from ctr_optim.ranks.valuation import (
    Existing,
    absent_directions,
    exchange_rate,
    existing_directions,
    host,
    in_nats,
    ordered,
    own_utility,
)
from ctr_optim.runtime.distributed import copy_first_, of_first, stack_whole

T = TypeVar("T")
C = TypeVar("C", Core, Existing)


@dataclass(frozen=True)
class Survey:
    """Utilities of one layer's existing directions and of k candidate directions.

    All tensors except ``rows`` and ``typical`` are float64 on the CPU.

    Attributes:
        block: the stack that contains the layer.
        pair: the layer.
        rank: number of directions in use, r.
        core: factors and bases of the r directions.
        existing: utilities of the r directions, and the maps that keep the best of them.
        absent: ``(k,)`` utilities of candidate directions, which the layer does not have yet.
        rows: ``(k, d_in)`` rows of A for the candidates; their norm is the mean norm of A's rows.
        cross, inner: ``A C rows^T (r, k)`` and ``rows C rows^T (k, k)``.
        typical: mean over directions of the second moments of A ``(1, d_in)`` and of B ``(1, d_out)``; None for a
            matrix that is not trained.
    """

    block: Factored
    pair: LoRAPair
    rank: int
    core: Core
    existing: Existing
    absent: Tensor
    rows: Tensor
    cross: Tensor
    inner: Tensor
    typical: Sequence[Tensor | None]


def lend_second_moments(surveys: Sequence[Survey]) -> list[Survey]:
    """Return the surveys; layers of rank 0 get the mean second moments of all other layers as ``typical``."""
    if all(s.rank for s in surveys):
        return list(surveys)
    home = surveys[0].rows
    means = []
    for side in (0, 1):
        known = [t.mean().to(home) for s in surveys if s.rank and (t := s.typical[side]) is not None]
        means.append(torch.stack(known).mean() if known else home.new_zeros(()))
    return [
        s
        if s.rank
        else replace(
            s, typical=[t if t is None else m.to(t).expand_as(t) for t, m in zip(s.typical, means, strict=True)]
        )
        for s in surveys
    ]


def survey(
    block: Factored, count: float, damping: float, fresh: bool = False, ranks: Mapping[str, int] | None = None
) -> list[Survey]:
    """Return a survey of every layer of a block.

    Args:
        block: layers of one shape, with their factors and gradient sketches.
        count: number of steps that the sketches sum over.
        damping: damping of the whitening, relative to the mean eigenvalue.
        fresh: whether the adapter is untrained. Directions in the span of A's random rows then count as absent.
        ranks: number of directions in use, by layer name; None for all allocated directions.
    """
    whiteners, weights = block.whiteners(damping), block.weights()
    in_use = [pair.rank if ranks is None else ranks[pair.name] for pair in block.pairs]
    surveys: dict[int, Survey] = {}
    for rank in sorted(set(in_use)):
        alike = [i for i, r in enumerate(in_use) if r == rank]
        for some in _portions(alike):
            surveys |= zip(some, _survey_alike(block, some, rank, weights, whiteners, count, fresh), strict=True)
    return [surveys[i] for i in range(len(in_use))]


def _portions(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Split into groups of at most 64: few kernel launches, and the float64 copies of one group fit into memory."""
    return (items[i : i + 64] for i in range(0, len(items), 64))


def _survey_alike(
    block: Factored,
    layers: Sequence[int],
    rank: int,
    weights: tuple[Tensor, Tensor],
    whiteners: tuple[Any, Any],
    count: float,
    fresh: bool,
) -> list[Survey]:
    """Return surveys of the given layers of a block, which all use ``rank`` directions."""
    at = torch.tensor(list(layers), device=block.H.device)
    a, b = weights[0][at, :rank], weights[1][at, :, :rank]
    H, D, C, S = host(block.H[at, :rank, :rank]), host(block.D[at, :rank, :rank]), block.C[at], block.S[at]
    existing = existing_directions(H, D)
    if block.sketch:
        omega, psi = block.test_matrices()
        w_in, w_out = (of_layers(whitener, at) for whitener in whiteners)
        # A's rows in whitened coordinates are A W^-1 = A C W^T. Only their span matters, so damping is left out.
        span_in = block.structure.whiten(w_in, C.matmul(a.mT))
        span_out = block.structure.whiten(w_out, S.matmul(b))
        span_in = torch.zeros_like(span_in) if fresh else span_in
        range_, corange = (sketch[at] / count for sketch in block.sketch)
        utility, directions = absent_directions(range_, corange, psi, span_in, span_out)
        rows = block.structure.whiten(w_in, directions, transpose=True)
        if (
            block.a is not None and VECTORS in block.a.tensors
        ):  # A learns in transformed coordinates, so new rows need the same transform
            rows = product(rows.mT, {key: t[at] for key, t in block.a.tensors.items()}).mT
        length = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
        # Where the sketch holds no further direction, use random rows, as a fresh adapter does.
        rows, length = torch.where(length > 0, rows, omega), torch.where(length > 0, length, omega.norm(dim=-2))
        # Give new rows the mean norm of the layer's rows, or the norm in a fresh adapter for a layer of rank 0.
        norm = torch.linalg.vector_norm(a, dim=-1).mean(-1) if rank else a.new_full((len(layers),), 3**-0.5)
        rows = (rows * (norm.view(-1, 1, 1) / length.clamp_min(1e-30))).mT
    else:
        utility, rows = H.new_zeros(len(layers), 0), a.new_zeros(len(layers), 0, a.shape[-1])
    c_rows = C.matmul(rows.mT)
    cross, inner = host(a @ c_rows), host(rows @ c_rows)
    # Unused directions have zero moments, so a sum over the allocated rank is the sum over the directions in use.
    sides = [
        (None if side is None else side.tensors["exp_avg_sq"][at].sum(dim) / max(1, rank))
        for side, dim in ((block.a, -2), (block.b, -1))
    ]
    eye = torch.eye(rank, dtype=H.dtype, device=H.device).expand(len(layers), -1, -1)
    bases = (eye if side is None else host(side.tensors["basis"][at, :rank, :rank]) for side in (block.a, block.b))
    core = Core(H, D, *bases)
    return [
        Survey(
            block,
            block.pairs[layer],
            rank,
            _of(core, i),
            _of(existing, i),
            utility[i],
            rows[i],
            cross[i],
            inner[i],
            [None if side is None else side[i : i + 1] for side in sides],
        )
        for i, layer in enumerate(layers)
    ]


def reallocate(
    surveys: Sequence[Survey],
    scheduler: RankScheduler,
    state: Callable[[Tensor], State | None],
    step: int,
    fresh: bool = False,
    masked: bool = False,
    coupling: float = 1.0,
) -> list[RankEvent]:
    """Allocate the budget, resize the layers that change, and return one event for each of them.

    All processes follow the candidates of the first process, so their ranks are equal.

    Args:
        surveys: one survey for each layer.
        scheduler: the scheduler that allocates ranks.
        state: returns the optimizer state of a parameter, which is changed in place; None if it is not trained.
        step: optimizer steps taken so far.
        fresh: whether to replace all directions by new ones (before the first step).
        masked: whether layers keep their allocated shapes.
        coupling: coupling of the whole adapter. It converts utilities to nats for a scheduler with a tolerance.
    """
    by_name = {s.pair.name: s for s in lend_second_moments(surveys)}
    ranks = {name: s.rank for name, s in by_name.items()}
    costs = {name: s.pair.cost for name, s in by_name.items()}
    change = scheduler.most_change(scheduler.mean_rank(costs, ranks))
    utilities = {name: (s.existing.utility.tolist(), s.absent.tolist()) for name, s in by_name.items()}
    if scheduler.tolerance is not None:
        candidates = {name: in_nats(*known, coupling) for name, known in utilities.items()}
    elif fresh:
        candidates = {name: [(u, False) for u in absent] for name, (_, absent) in utilities.items()}
    else:
        exchange = exchange_rate(utilities.values())
        favour, by_spectrum = 1 + scheduler.hysteresis, scheduler.absent == "spectrum"
        candidates = {
            name: ordered(*known, favour, exchange if by_spectrum else None) for name, known in utilities.items()
        }
        if change is not None:
            candidates = {name: found[: ranks[name] + change] for name, found in candidates.items()}
    candidates = of_first(candidates)
    worth = {name: [u for u, _ in cs] for name, cs in candidates.items()}
    limits = {name: min(s.pair.max_rank, s.pair.rank) if masked else s.pair.max_rank for name, s in by_name.items()}
    if scheduler.tolerance is not None:
        new = scheduler.within(worth, costs, ranks, limits)
    else:
        floors = {} if fresh or change is None else {name: rank - change for name, rank in ranks.items()}
        new = scheduler.allocate(worth, costs, ranks, limits, floors)
    events, changes = [], dict[Any, list[Survey]]()
    for name, s in by_name.items():
        chosen = candidates[name][: new[name]]
        kept = sum(exists for _, exists in chosen)
        if kept == ranks[name] == new[name]:
            continue
        changes.setdefault((id(s.block), s.rank, kept, new[name] - kept), []).append(s)
        reason = "turn" if new[name] == ranks[name] else "grow" if new[name] > ranks[name] else "shrink"
        last = 1e6 * own_utility(*chosen[-1], 1 + scheduler.hysteresis) / s.pair.cost if chosen else 0.0
        events.append(RankEvent(step, name, ranks[name], new[name], kept, last, reason))
    for (_, _, kept, added), alike in changes.items():
        for some in _portions(alike):
            resize(some, kept, added, state, masked)
    return events


def resize(
    some: Sequence[Survey], kept: int, added: int, state: Callable[[Tensor], State | None], masked: bool = False
) -> None:
    """Keep the best ``kept`` directions of each layer, and add its ``added`` most useful absent directions.

    A layer is truncated to the directions in use, resized, and zero-padded. The padded rank is the allocated rank if
    ``masked``; else it is the new rank, at least 1, because LoRA libraries have no layers of rank 0.

    Args:
        some: surveys of layers of one block that use the same number of directions.
        kept, added: number of directions to keep and to add.
        state: as in :func:`reallocate`.
        masked: as in :func:`reallocate`.
    """
    pairs = [s.pair for s in some]
    room = pairs[0].rank if masked else max(1, kept + added)
    core, cross = _stacked([s.core for s in some]), torch.stack([s.cross[:, :added] for s in some])
    if kept < some[0].rank:
        on = projection(_stacked([s.existing for s in some]), kept)
        (core, maps), cross = shrink(core, on), on.keep @ cross
    else:
        core, maps = unchanged(core)
    core = padded(grow(core, cross, torch.stack([s.inner[:added, :added] for s in some])), room)
    rows = torch.stack([s.rows[:added] for s in some])
    columns = rows.new_zeros(len(some), added, pairs[0].B.shape[0])
    a, new_a = _move(some, 0, rows, maps[0], room, state)
    b, new_b = _move(some, 1, columns, maps[1], room, state)
    small = [{"basis": core.basis_a}, {"basis": core.basis_b, "rank_input": core.H, "rank_output": core.D}]
    for new, factors in zip((new_a, new_b), small, strict=True):
        new |= {name: t.to(rows, non_blocking=True).contiguous() for name, t in factors.items() if new}
    copy_first_([a, b, *new_a.values(), *new_b.values()])
    for i, pair in enumerate(pairs):
        for p, new in ((pair.A, new_a), (pair.B, new_b)):
            if found := state(p):
                found.update({name: t[i] for name, t in new.items()})
        if masked:
            pair.fill(a[i], b[i])
        else:
            pair.resize(a[i], b[i])


def _move(
    some: Sequence[Survey],
    side: int,
    new: Tensor,
    maps: Tensor,
    room: int,
    state: Callable[[Tensor], State | None],
) -> tuple[Tensor, State]:
    """Return weights and moments of A (side 0) or B (side 1) after a resize; no moments if it is not trained.

    Args:
        new: ``(L, k, d)`` weights of new directions. Their first moments are zero, their second moments typical.
        maps: ``(L, 3, e, r)`` maps of weights and of both moments (:func:`carry`).
        room: rank after zero-padding.
    """

    def turned(t: Tensor) -> Tensor:
        return t.mT if side else t  # B stores the rank dimension last; carry() expects it before the wide one

    parameters = [s.pair.B if side else s.pair.A for s in some]
    states = [found for p in parameters if (found := state(p))]
    wide = [stack_whole([p.detach() for p in parameters])]
    starts = [new]
    if states:
        wide += [torch.stack([found[name] for found in states]) for name in _MOMENTS]
        typical = torch.stack([t for s in some if (t := s.typical[side]) is not None])
        starts += [torch.zeros_like(new), typical.to(new).expand_as(new)]
    old = torch.stack([turned(t)[:, : some[0].rank].double() for t in wide], 1)
    moved = turned(carry(old, maps, torch.stack(starts, 1), room)).to(new.dtype).contiguous()
    weights, *moments = moved.unbind(1)
    return weights, dict(zip(_MOMENTS, moments, strict=False))


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _stacked(layers: Sequence[C]) -> C:
    """Stack the tensors of several layers."""
    names = [field.name for field in fields(layers[0])]
    return type(layers[0])(*(torch.stack([getattr(layer, name) for layer in layers]) for name in names))


def _of(layers: C, index: int) -> C:
    """Return the entry of one layer."""
    return type(layers)(*(getattr(layers, field.name)[index] for field in fields(layers)))
