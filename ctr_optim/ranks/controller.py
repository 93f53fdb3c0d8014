"""Rank events during training: when to sketch, when to reallocate, and who is told."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from ctr_optim.curvature.blocks import Block
from ctr_optim.ranks.reallocation import reallocate, survey
from ctr_optim.ranks.scheduler import RankEvent, RankScheduler


class RankController:
    """Drives one RankScheduler; what it needs between events lives in the optimizer's state."""

    def __init__(self, scheduler: RankScheduler, damping: float) -> None:
        self.scheduler, self.damping = scheduler, damping
        self.listeners: list[Callable[[RankEvent], None]] = []
        self.utility: dict[str, float] = {}

    def event(
        self, blocks: Sequence[Block], state: MutableMapping[Any, dict[str, Tensor]], step: int, sketched: int
    ) -> list[RankEvent]:
        """Survey, share out, resize. The sketches are gone from the state then: the caller restacks in any case."""
        surveys = [s for block in blocks for s in survey(block, max(1, sketched), self.damping)]
        surveys.sort(key=lambda s: s.pair.name)
        self.utility = {s.pair.name: float(s.existing.utility.sum()) for s in surveys}
        for s in surveys:
            for name in ("sketch_range", "sketch_corange"):
                state[s.pair.B].pop(name, None)
        events = reallocate(surveys, self.scheduler, lambda p: state.get(p), step)
        for event in events:
            for listener in self.listeners:
                listener(event)
        return events
