"""Ranks that change: rank events, the scheduler, and the listeners."""

from __future__ import annotations

from collections.abc import Callable

from ctr_optim.curvature.blocks import drop_sketches
from ctr_optim.curvature.kfac import KFAC
from ctr_optim.model import checks
from ctr_optim.ranks.events import RankEvent
from ctr_optim.ranks.scheduler import RankScheduler
from ctr_optim.runtime import distributed
from ctr_optim.runtime.devices import exact
from ctr_optim.weights import Weights


class Ranked(Weights):
    """Optimizer whose layers can change their ranks."""

    @property
    def ranks(self) -> dict[str, int]:
        """Rank in use of each layer, by name. After a checkpoint is loaded, this may wait for device and processes."""
        if self._ranks is not None:
            distributed.reshard(self._trained.fsdp)
            return dict(self._ranks.ranks)
        return {pair.name: pair.rank for pair in self.pairs}

    @property
    def rank_scheduler(self) -> RankScheduler | None:
        """The rank scheduler, or None. A new scheduler may be assigned during training."""
        return self._scheduler

    @rank_scheduler.setter
    def rank_scheduler(self, scheduler: RankScheduler) -> None:
        if self._ranks is None:
            raise ValueError("rank_scheduler: this optimizer was built without one; pass it to CTROptimizer")
        self._scheduler = scheduler
        self._ranks.use(scheduler)
        if not scheduler.sketches(self.steps):
            drop_sketches(self.state, self.pairs)
            self._restack()
        self._arm()

    def on_rank_event(self, listener: Callable[[RankEvent], None]) -> None:
        """Call ``listener`` with each :class:`RankEvent`, ordered by layer name; ValueError without a scheduler."""
        if self._ranks is None:
            raise ValueError("on_rank_event: this optimizer has no rank_scheduler; pass one to CTROptimizer")
        self._ranks.listeners.append(listener)

    def _reallocate(self) -> None:
        """Run a rank event if one is due."""
        if self._ranks is None:
            return
        checks.check_ranks_belong_to_us(self.param_groups)
        step, curvature = self._counters.steps, self._curvature
        if step != self._ranks.scheduler.next_event(step):
            return
        if not (isinstance(curvature, KFAC) and curvature.able):  # A closed optimizer collects no statistics.
            return
        masked = self._masked()
        if not masked:
            checks.check_single_process()
        blocks = self.blocks
        distributed.reshard(self._trained.fsdp)
        try:
            with exact(block.H.device for block in blocks):
                coupling = self._trust.coupling.of_adapter if self._trust.coupling.known else None
                self._ranks.event(blocks, self.state, step, masked, coupling)
        finally:
            self._forget_shapes()
