"""Rank events during training: count sketched steps, reallocate ranks, and call the listeners."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ctr_optim.curvature.base import Factored
from ctr_optim.model import checks
from ctr_optim.model.pair import LoRAPair, ranks_in_use
from ctr_optim.ranks.allocation import Survey, reallocate, survey
from ctr_optim.ranks.events import RankEvent
from ctr_optim.ranks.scheduler import RankScheduler
from ctr_optim.runtime.counters import Counters
from ctr_optim.runtime.messages import warn_failed


@dataclass(slots=True)
class RankState:
    """Numbers that a checkpoint stores for the rank controller.

    Attributes:
        sketched: number of steps that the open sketches sum over, without skipped steps.
        budget: mean rank of the model at the start of training; None before the first event.
    """

    sketched: int = 0
    budget: float | None = None


class RankController:
    """Runs the rank events of one RankScheduler. Sketches between events live in the optimizer's state.

    Args:
        scheduler: decides when ranks move and how the budget is allocated.
        damping: damping of the whitening, relative to the mean eigenvalue.
        pairs: all LoRA layers of the model.
        listeners: functions that are called with every event.
        numbers: numbers that a checkpoint stores.
        counters: counts of skipped steps and failed decompositions.

    Raises:
        ValueError: two layers have the same name, or the budget is impossible.
    """

    def __init__(
        self,
        scheduler: RankScheduler,
        damping: float,
        pairs: Sequence[LoRAPair],
        listeners: list[Callable[[RankEvent], None]],
        numbers: RankState,
        counters: Counters,
    ) -> None:
        twice = [name for name, count in Counter(pair.name for pair in pairs).items() if count > 1]
        if twice:
            raise ValueError(
                f"rank_scheduler: several layers are named {twice[0]!r}, expected one model; build one optimizer for "
                "each model"
            )
        # Reject impossible budgets at construction, not at the first event.
        scheduler.allocate(
            {pair.name: [0.0] * pair.max_rank for pair in pairs},
            {pair.name: pair.cost for pair in pairs},
            {pair.name: pair.rank for pair in pairs},
        )
        self.damping, self.listeners = damping, listeners
        self.use(scheduler)
        self.numbers, self.counters = numbers, counters
        self.utility: dict[str, float] = {}
        self._pairs = list(pairs)
        self._in_use: dict[str, int] | None = None
        self._counted: Tensor | None = None  # () steps sketched since the last settle(), on the device
        self._pending: list[RankEvent] = []

    @property
    def ranks(self) -> dict[str, int]:
        """Number of directions in use, by layer name; counted in the weights at the start and after a load."""
        if self._in_use is None:
            self._in_use = dict(zip((p.name for p in self._pairs), ranks_in_use(self._pairs), strict=True))
        return self._in_use

    @property
    def known(self) -> dict[str, int]:
        """Like :attr:`ranks`, without waiting for a device or a process: allocated ranks if the counts are unknown."""
        return {p.name: p.rank for p in self._pairs} if self._in_use is None else dict(self._in_use)

    def use(self, scheduler: RankScheduler) -> None:
        """Replace the scheduler. Warn if the new scheduler has no event."""
        self.scheduler = scheduler
        if scheduler.next_event(0) is None:
            checks.warn_no_event(scheduler)

    def forget_ranks(self) -> None:
        """Count the directions in use again at the next access, because the weights were loaded."""
        self._in_use = None

    def begin_sketch(self) -> None:
        """Reset the count of sketched steps to zero."""
        self.numbers.sketched, self._counted = 0, None

    def count_sketched(self, finite: Tensor) -> None:
        """Count one sketched step, unless it is skipped. Does not wait for the device.

        Args:
            finite: ``()`` boolean, whether the step's gradients are finite.
        """
        one = finite.long()
        self._counted = one if self._counted is None else self._counted + one.to(self._counted.device)

    def settle(self) -> None:
        """Add the device's count of sketched steps to ``numbers.sketched``. Waits for the device."""
        if self._counted is not None:
            self.numbers.sketched += int(self._counted)
            self._counted = None

    def event(
        self,
        blocks: Sequence[Factored],
        state: MutableMapping[Any, dict[str, Tensor]],
        step: int,
        masked: bool,
        coupling: float | None = None,
    ) -> list[RankEvent]:
        """Survey the layers, allocate ranks and resize. Return the events; none if a decomposition failed.

        This method removes the sketches from the state, so the caller must restack the parameters, also if no rank
        changed. It does not call the listeners (:meth:`notify` does). The budget does not shrink when an event leaves
        a part of it unused.

        Args:
            blocks: layers of one shape each, with their factors and sketches.
            state: the optimizer's state by parameter, changed in place.
            step: optimizer steps taken so far.
            masked: whether layers keep their allocated shapes.
            coupling: coupling of the whole adapter (``Coupling.of_adapter``). A scheduler with a tolerance needs it.

        Raises:
            ValueError: the scheduler has a tolerance in nats, and no coupling was measured.
        """
        if self.scheduler.tolerance is not None and coupling is None:
            raise ValueError(
                "rank_scheduler: tolerance is in nats, and the optimizer has not measured the coupling that converts "
                "utilities to nats (metrics()['trust/source'] gives the reason). Use RankScheduler(budget=...), or "
                "call ctr_optim.compress after training"
            )
        ranks = self.ranks
        self.settle()
        try:
            count = max(1, self.numbers.sketched)
            surveys = [s for block in blocks for s in survey(block, count, self.damping, ranks=ranks)]
        except LinAlgError:
            warn_failed("the factors at a rank event", "all ranks stay as they are")
            self.counters.failed += 1
            return []
        finally:
            for block in blocks:
                block.drop_sketch(state)
        surveys.sort(key=lambda s: s.pair.name)
        self.utility = {s.pair.name: float(s.existing.utility.sum()) for s in surveys}
        scheduler = self._with_budget(surveys, step)
        full = scheduler.parameters({p.name: p.cost for p in self._pairs}, ranks) >= self._allocated()
        if masked and full and scheduler.tolerance is None:
            checks.warn_if_full()
        self.forget_ranks()  # if the resize fails halfway, the ranks must be counted in the weights again
        events = reallocate(
            surveys,
            scheduler,
            lambda p: state.get(p),
            step,
            masked=masked,
            coupling=1.0 if coupling is None else coupling,
        )
        self._in_use = ranks | {event.name: event.new_rank for event in events}
        self._pending += events
        return events

    def notify(self) -> None:
        """Call every listener with every new event, then raise the first error that a listener raised."""
        events, self._pending = self._pending, []
        errors: list[Exception] = []
        for event in events:
            for listener in self.listeners:
                try:
                    listener(event)
                except Exception as error:  # one failing listener must not hide the event from the others
                    errors.append(error)
        if errors:
            raise errors[0]

    def _with_budget(self, surveys: Sequence[Survey], step: int) -> RankScheduler:
        """Return the scheduler with this event's budget; unchanged if it has a tolerance instead of a budget."""
        if self.scheduler.tolerance is not None:
            return self.scheduler
        if self.numbers.budget is None:
            parameters = sum(s.rank * s.pair.cost for s in surveys)
            self.numbers.budget = parameters / sum(s.pair.cost for s in surveys)
        budget = self.scheduler.budget_at(step, self.numbers.budget)
        return replace(self.scheduler, budget=max(budget, self.scheduler.min_rank), gradual=False)

    def _allocated(self) -> int:
        """Return the number of allocated LoRA parameters."""
        return sum(pair.rank * pair.cost for pair in self._pairs)
