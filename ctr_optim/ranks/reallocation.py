"""One rank event: survey every layer, share out the budget, resize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctr_optim.curvature.blocks import Block
from ctr_optim.curvature.capture import of_layers
from ctr_optim.lora import LoRAPair
from ctr_optim.ranks.resize import State, grow, projection, shrink, typical_second_moment
from ctr_optim.ranks.scheduler import RankEvent, RankScheduler
from ctr_optim.ranks.utility import Existing, absent_directions, existing_directions, reconstruct


def extrapolate(utility: Sequence[float], count: int) -> list[float]:
    """The next ``count`` utilities of a layer, if they fall on as they do: geometrically, by a half for rank 1."""
    first, last = utility[0], utility[-1]
    fall = 0.5 if len(utility) == 1 or first <= 0 else (last / first) ** (1 / (len(utility) - 1))
    return [last * fall**k for k in range(1, count + 1)]


@dataclass(frozen=True)
class Survey:
    """What one layer could do with rank.

    Attributes:
        pair: the layer.
        existing: its directions.
        absent: ``(k,)`` utilities of directions that it lacks.
        rows: ``(k, d_in)`` rows of A for them, of the mean norm of A's own rows.
        cross, inner: ``A C rows^T (r, k)`` and ``rows C rows^T (k, k)``.
    """

    pair: LoRAPair
    existing: Existing
    absent: Tensor
    rows: Tensor
    cross: Tensor
    inner: Tensor

    def candidates(self, scheduler: RankScheduler) -> list[tuple[float, bool]]:
        """Utilities, largest first, and whether the direction exists; what exists is favoured by hysteresis."""
        existing, absent = self.existing.utility.tolist(), self.absent.tolist()
        if scheduler.absent == "spectrum":
            absent = extrapolate(existing, len(absent))
        have = [((1 + scheduler.hysteresis) * u, True) for u in existing]
        lack = [(u, False) for u in absent]
        ordered = sorted(have + lack, key=lambda c: (-c[0], not c[1]))
        most = scheduler.max_change
        return ordered if most is None else ordered[: self.pair.rank + most]


def survey(block: Block, count: float, damping: float, fresh: bool = False) -> list[Survey]:
    """Utilities of a block's layers, from their factors and from sketches summed over ``count`` steps.

    ``fresh``: A's rows mean nothing yet, and what they reach counts as absent, too.
    """
    omega_psi = block.test_matrices() if block.sketch else None
    whiten_in, whiten_out = block.whiteners(damping)
    surveys = []
    for i, pair in enumerate(block.pairs):
        a, b = pair.A.detach().to(block.H.dtype), pair.B.detach().to(block.H.dtype)
        w_in, w_out = of_layers(whiten_in, i), of_layers(whiten_out, i)
        C, S = block.C[i], block.S[i]
        existing = existing_directions(block.H[i], block.D[i])
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
            norm = torch.linalg.vector_norm(a, dim=-1).mean()
            rows = rows * (norm / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1e-30))
        c_rows = C.matmul(rows.mT)
        surveys.append(Survey(pair, existing, utility, rows, a @ c_rows, rows @ c_rows))
    return surveys


def reallocate(
    surveys: Sequence[Survey],
    scheduler: RankScheduler,
    state: Callable[[Tensor], State | None],
    step: int,
    fresh: bool = False,
) -> list[RankEvent]:
    """Share out the budget and resize the layers that change.

    Args:
        state: the optimizer's state of a parameter, changed in place; None for one that it does not train.
        fresh: take new directions only (before the first step).
    """
    by_name = {s.pair.name: s for s in surveys}
    candidates = {name: s.candidates(scheduler) for name, s in by_name.items()}
    if fresh:
        candidates = {name: [(u, False) for u in s.absent.tolist()] for name, s in by_name.items()}
    ranks = {name: s.pair.rank for name, s in by_name.items()}
    new = scheduler.allocate(
        {name: [u for u, _ in cs] for name, cs in candidates.items()},
        {name: s.pair.cost for name, s in by_name.items()},
        ranks,
        {name: s.pair.max_rank for name, s in by_name.items()},
        {}
        if fresh or scheduler.max_change is None
        else {n: max(1, r - scheduler.max_change) for n, r in ranks.items()},
    )
    events = []
    for name, s in by_name.items():
        chosen = candidates[name][: new[name]]
        kept = sum(exists for _, exists in chosen)
        if kept == ranks[name] == new[name]:
            continue
        resize(s, kept, new[name] - kept, state)
        reason = "turn" if new[name] == ranks[name] else "grow" if new[name] > ranks[name] else "shrink"
        worth = 1e6 * chosen[-1][0] / s.pair.cost if chosen else 0.0
        events.append(RankEvent(step, name, ranks[name], new[name], kept, worth, reason))
    return events


def resize(s: Survey, kept: int, added: int, state: Callable[[Tensor], State | None]) -> None:
    """Keep the best ``kept`` directions of a layer and give it its ``added`` most useful absent ones."""
    pair = s.pair
    state_a, state_b = state(pair.A), state(pair.B)
    assert state_b is not None
    a, b = pair.A.detach().to(s.rows.dtype), pair.B.detach().to(s.rows.dtype)
    sides = [
        (side, dim, None if side is None else typical_second_moment(side, dim))
        for side, dim in ((state_a, 0), (state_b, 1))
    ]
    cross = s.cross[:, :added]
    if kept < pair.rank:
        on = projection(s.existing, kept)
        a, b = shrink(a, b, state_a, state_b, on)
        cross = on.keep.to(cross.dtype) @ cross
    if added:
        a, b = grow(a, b, sides, state_b, s.rows[:added], cross, s.inner[:added, :added])
    pair.resize(a, b)
