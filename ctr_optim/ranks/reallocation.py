"""One rank event: survey every layer, share out the budget, resize."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ctr_optim.curvature.blocks import Block
from ctr_optim.curvature.capture import of_layers
from ctr_optim.distributed import copy_first_, of_first
from ctr_optim.lora import LoRAPair, sized
from ctr_optim.ranks.resize import State, cut, grow, pad, projection, shrink
from ctr_optim.ranks.scheduler import RankEvent, RankScheduler
from ctr_optim.ranks.utility import Existing, absent_directions, existing_directions, reconstruct


def extrapolate(utility: Sequence[float], count: int) -> list[float]:
    """The next ``count`` utilities of a layer, if they fall on as they do: geometrically, by a half for rank 1."""
    if not utility:
        return [0.0] * count
    first, last = utility[0], utility[-1]
    fall = 0.5 if len(utility) == 1 or first <= 0 else (last / first) ** (1 / (len(utility) - 1))
    return [last * fall**k for k in range(1, count + 1)]


@dataclass(frozen=True)
class Survey:
    """What one layer could do with rank.

    Attributes:
        pair: the layer.
        rank: the directions that it uses.
        existing: these directions.
        absent: ``(k,)`` utilities of directions that it lacks.
        rows: ``(k, d_in)`` rows of A for them, of the mean norm of A's own rows.
        cross, inner: ``A C rows^T (r, k)`` and ``rows C rows^T (k, k)``.
        typical: mean over directions of the second moments of A ``(1, d_in)`` and B ``(d_out, 1)``; None for one that
            is not trained.
    """

    pair: LoRAPair
    rank: int
    existing: Existing
    absent: Tensor
    rows: Tensor
    cross: Tensor
    inner: Tensor
    typical: Sequence[Tensor | None]

    def candidates(self, scheduler: RankScheduler, exchange: float) -> list[tuple[float, bool]]:
        """Utilities, largest first, and whether the direction exists; what exists is favoured by hysteresis.

        Args:
            exchange: what one unit of the sketch's utility is worth in those of existing directions; for layers that
                have no spectrum to go by.
        """
        existing, absent = self.existing.utility.tolist(), self.absent.tolist()
        if scheduler.absent == "spectrum":
            absent = extrapolate(existing, len(absent)) if existing else [exchange * u for u in absent]
        have = [((1 + scheduler.hysteresis) * u, True) for u in existing]
        lack = [(u, False) for u in absent]
        ordered = sorted(have + lack, key=lambda c: (-c[0], not c[1]))
        most = scheduler.max_change
        return ordered if most is None else ordered[: self.rank + most]


def exchange_rate(surveys: Sequence[Survey]) -> float:
    """The median over layers of what the next direction is worth by its spectrum, over what it is by the sketch."""
    if all(s.rank for s in surveys):
        return 1.0  # nobody asks
    rates = [
        extrapolate(s.existing.utility.tolist(), 1)[0] / float(s.absent[0])
        for s in surveys
        if s.rank and len(s.absent) and float(s.absent[0]) > 0
    ]
    return statistics.median(rates) if rates else 1.0


def lend_second_moments(surveys: Sequence[Survey]) -> list[Survey]:
    """The surveys, layers without a direction with the mean second moment of all others' for the first they get."""
    if all(s.rank for s in surveys):
        return list(surveys)
    means = []
    for side in (0, 1):
        known = [float(t.mean()) for s in surveys if s.rank and (t := s.typical[side]) is not None]
        means.append(sum(known) / max(1, len(known)))
    return [
        s
        if s.rank
        else replace(
            s, typical=[t if t is None else torch.full_like(t, m) for t, m in zip(s.typical, means, strict=True)]
        )
        for s in surveys
    ]


def survey(
    block: Block, count: float, damping: float, fresh: bool = False, ranks: Mapping[str, int] | None = None
) -> list[Survey]:
    """Utilities of a block's layers, from their factors and from sketches summed over ``count`` steps.

    Args:
        fresh: A's rows mean nothing yet, and what they reach counts as absent, too.
        ranks: directions in use, by layer; None: all that there is room for.
    """
    omega_psi = block.test_matrices() if block.sketch else None
    whiten_in, whiten_out = block.whiteners(damping)
    in_use = [pair.rank if ranks is None else ranks[pair.name] for pair in block.pairs]
    surveys = []
    for i, (pair, rank) in enumerate(zip(block.pairs, in_use, strict=True)):
        a, b = (w.to(block.H.dtype) for w in pair.weights(rank))
        w_in, w_out = of_layers(whiten_in, i), of_layers(whiten_out, i)
        C, S = block.C[i], block.S[i]
        existing = existing_directions(block.H[i, :rank, :rank], block.D[i, :rank, :rank])
        if omega_psi is None:
            utility, rows = a.new_zeros(0), a.new_zeros(0, a.shape[1])
        else:
            q, x = reconstruct(block.sketch[0][i] / count, block.sketch[1][i] / count, omega_psi[1])
            # A's rows in whitened coordinates are A W^-1 = A C W^T (undamped, only their span matters)
            span_in = block.structure.whiten(w_in, C.matmul(a.mT))
            span_out = block.structure.whiten(w_out, S.matmul(b))
            span_in = span_in.new_zeros(span_in.shape) if fresh else span_in
            utility, directions = absent_directions(q, x, span_in, span_out)
            rows = block.structure.whiten(w_in, directions.mT, transpose=True).mT
            norm = torch.linalg.vector_norm(a, dim=-1).mean() if rank else 3**-0.5  # rows as fresh adapters have them
            rows = rows * (norm / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1e-30))
        c_rows = C.matmul(rows.mT)
        # directions not in use have none: sums over the room are sums over those in use
        typical = [
            None if side is None else side.tensors["exp_avg_sq"][i].sum(dim, keepdim=True) / max(1, rank)
            for side, dim in ((block.a, 0), (block.b, 1))
        ]
        surveys.append(Survey(pair, rank, existing, utility, rows, a @ c_rows, rows @ c_rows, typical))
    return surveys


def reallocate(
    surveys: Sequence[Survey],
    scheduler: RankScheduler,
    state: Callable[[Tensor], State | None],
    step: int,
    fresh: bool = False,
    masked: bool = False,
) -> list[RankEvent]:
    """Share out the budget and resize the layers that change; the same way in every process.

    Args:
        state: the optimizer's state of a parameter, changed in place; None for one that it does not train.
        fresh: take new directions only (before the first step).
        masked: layers keep the shapes that they were allocated with.
    """
    by_name = {s.pair.name: s for s in lend_second_moments(surveys)}
    exchange = exchange_rate(surveys)
    candidates = {name: s.candidates(scheduler, exchange) for name, s in by_name.items()}
    if fresh:
        candidates = {name: [(u, False) for u in s.absent.tolist()] for name, s in by_name.items()}
    candidates = of_first(candidates)
    ranks = {name: s.rank for name, s in by_name.items()}
    new = scheduler.allocate(
        {name: [u for u, _ in cs] for name, cs in candidates.items()},
        {name: s.pair.cost for name, s in by_name.items()},
        ranks,
        {name: min(s.pair.max_rank, s.pair.rank) if masked else s.pair.max_rank for name, s in by_name.items()},
        {} if fresh or scheduler.max_change is None else {n: r - scheduler.max_change for n, r in ranks.items()},
    )
    events = []
    for name, s in by_name.items():
        chosen = candidates[name][: new[name]]
        kept = sum(exists for _, exists in chosen)
        if kept == ranks[name] == new[name]:
            continue
        resize(s, kept, new[name] - kept, state, masked)
        reason = "turn" if new[name] == ranks[name] else "grow" if new[name] > ranks[name] else "shrink"
        worth = 1e6 * chosen[-1][0] / s.pair.cost if chosen else 0.0
        events.append(RankEvent(step, name, ranks[name], new[name], kept, worth, reason))
    return events


def resize(s: Survey, kept: int, added: int, state: Callable[[Tensor], State | None], masked: bool = False) -> None:
    """Keep the best ``kept`` directions of a layer and give it its ``added`` most useful absent ones.

    The layer is cut to the directions that it uses, resized, and filled up with zeros to the room that it has: what was
    allocated if ``masked``, else the new rank (at least 1: libraries know no layers of rank 0).
    """
    pair = s.pair
    room = pair.rank if masked else max(1, kept + added)
    states = [(p, dim, found) for p, dim in ((pair.A, 0), (pair.B, 1)) if (found := state(p))]
    parts = {dim: cut(found, dim, s.rank) for _, dim, found in states}
    a, b = (w.to(s.rows.dtype) for w in pair.weights(s.rank))
    cross = s.cross[:, :added]
    if kept < s.rank:
        on = projection(s.existing, kept)
        a, b = shrink(a, b, parts.get(0), parts[1], on)
        cross = on.keep.to(cross.dtype) @ cross
    if added:
        sides = [(parts.get(dim), dim, s.typical[dim]) for dim in (0, 1)]
        a, b = grow(a, b, sides, parts[1], s.rows[:added], cross, s.inner[:added, :added])
    padded = {dim: pad(part, dim, room) for dim, part in parts.items()}
    a, b = sized(a, (0,), room).contiguous(), sized(b, (1,), room).contiguous()
    copy_first_([a, b, *(t for part in padded.values() for t in part.values())])
    for _, dim, found in states:
        found.update(padded[dim])
    if masked:
        pair.fill(a, b)
    else:
        pair.resize(a, b)
