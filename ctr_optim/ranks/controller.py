"""Rank events during training: when to sketch, when to reallocate, and who is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ctr_optim.curvature.blocks import Block, drop_sketches
from ctr_optim.gradients import warn_failed
from ctr_optim.lora import LoRAPair
from ctr_optim.ranks.reallocation import reallocate, survey
from ctr_optim.ranks.scheduler import RankEvent, RankScheduler


class RankController:
    """Drives one RankScheduler; what it needs between events lives in the optimizer's state."""

    def __init__(self, scheduler: RankScheduler, damping: float, pairs: Sequence[LoRAPair]) -> None:
        twice = [name for name, count in Counter(pair.name for pair in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"rank_scheduler: several layers are named {twice[0]!r}; train one model an optimizer")
        # impossible budgets are heard of here, not at the first event
        scheduler.allocate(
            {pair.name: [0.0] * pair.max_rank for pair in pairs},
            {pair.name: pair.cost for pair in pairs},
            {pair.name: pair.rank for pair in pairs},
        )
        self.scheduler, self.damping = scheduler, damping
        self.listeners: list[Callable[[RankEvent], None]] = []
        self.utility: dict[str, float] = {}

    def event(
        self, blocks: Sequence[Block], state: MutableMapping[Any, dict[str, Tensor]], shared: dict[str, Any]
    ) -> list[RankEvent]:
        """Survey, share out, resize. The sketches are gone from the state then: the caller restacks in any case.

        The budget that the model starts with is kept in ``shared``: what one event leaves unspent, the next may use.
        """
        try:
            surveys = [s for block in blocks for s in survey(block, max(1, shared["sketched"]), self.damping)]
        except LinAlgError:
            shared["failed"] += 1
            warn_failed("the factors at a rank event", "all ranks stay as they are")
            return []
        finally:
            drop_sketches(state, [pair for block in blocks for pair in block.pairs])
        surveys.sort(key=lambda s: s.pair.name)
        self.utility = {s.pair.name: float(s.existing.utility.sum()) for s in surveys}
        scheduler = self.scheduler
        if scheduler.budget is None:
            parameters = sum(s.pair.rank * s.pair.cost for s in surveys)
            mean = shared.setdefault("budget", parameters / sum(s.pair.cost for s in surveys))
            scheduler = replace(scheduler, budget=mean)
        events = reallocate(surveys, scheduler, lambda p: state.get(p), shared["steps"])
        for event in events:
            for listener in self.listeners:
                listener(event)
        return events
