"""RankScheduler: compute ranks from a budget and utilities. Deterministic, and equal in every process."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ctr_optim.ranks.truncation import cumulative, ranks_after, removals
from ctr_optim.runtime.options import suggests_options


@dataclass(frozen=True)
class RankScheduler:
    """Schedule of rank events, and allocation of a parameter budget to layers.

    Args:
        budget: mean rank over layers, each layer weighted with the parameters of one direction. None keeps the
            model's initial mean rank.
        gradual: whether the budget falls in equal parts from the model's initial mean rank, and is reached at the last
            event. If False, or without ``total_steps``, the budget applies from the first event. Allocate twice the
            budget to choose the final adapter from twice as many directions.
        interval: steps between events.
        start, until: first and last event, as fractions of ``total_steps``.
        total_steps: number of training steps. With None, events never stop.
        min_rank, max_rank: smallest and largest rank of a layer. ``max_rank=None`` is four times the mean rank. With
            ``min_rank=0`` a layer may lose all directions and get new ones later (its weights are zero meanwhile, and
            :func:`ctr_optim.export_compact` leaves it out). With masked ranks (see ``resize``), no layer exceeds its
            allocated rank.
        hysteresis: existing directions count with ``1 + hysteresis`` times their utility, so that noise does not
            change ranks back and forth.
        absent: how to estimate the utility of a direction that a layer does not have. ``"spectrum"`` extrapolates the
            utilities of the layer's own directions. ``"sketch"`` uses the sketched gradient.
        max_change: largest change of a layer's rank at one event, at least ``multiple``; None for no limit.
        multiple: ranks are multiples of this number. None is a quarter of the mean rank, rounded down to a power of
            two: 1 below 8, 2 at 8, 4 at 16. Few different ranks are faster, because layers of one shape and rank share
            batched calls. In half precision, multiples of 8 multiply faster than odd ranks.
        window: number of steps before each event in which the gradient is sketched.
        sketch_rank: largest number of directions that a layer can gain at one event.
        tolerance: cost of all events together in nats per token, in place of a budget. Each event removes the
            directions with the least utility per parameter until its share of the tolerance is spent. The cost is
            predicted with the measured coupling of the whole adapter; later training recovers a part of it. Start with
            more directions than you need. A layer loses at most half of its directions at one event. Layers grow only
            if ``max_rank`` is given: a layer that lost nothing grows if the utility per parameter of its next
            directions exceeds ``1 + hysteresis`` times that of the cheapest remaining removal.
    """

    budget: float | None = None
    gradual: bool = False
    interval: int = 100
    start: float = 0.0
    until: float = 0.6
    total_steps: int | None = None
    min_rank: int = 1
    max_rank: int | None = None
    hysteresis: float = 3.0
    absent: str = "spectrum"
    max_change: int | None = 2
    multiple: int | None = None
    window: int = 8
    sketch_rank: int = 8
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and not (math.isfinite(self.budget) and self.budget >= self.min_rank):
            raise ValueError(f"budget: got {self.budget!r}, expected a mean rank of at least min_rank={self.min_rank}")
        if not 0.0 <= self.start <= self.until <= 1.0:
            raise ValueError(f"start, until: got {self.start!r}, {self.until!r}, expected 0 <= start <= until <= 1")
        optional = ("max_rank", "total_steps", "max_change", "multiple")
        for name in ("interval", "min_rank", "window", "sketch_rank", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            least = int(name != "min_rank")
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                hint = ", or None" if name in optional else ""
                raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {least}{hint}")
        if self.gradual and self.budget is None:
            raise ValueError(
                "gradual: got True without a budget; set RankScheduler(budget=...), the mean rank at the last event"
            )
        if self.tolerance is not None:
            if not (math.isfinite(self.tolerance) and self.tolerance > 0):
                raise ValueError(f"tolerance: got {self.tolerance!r}, expected a positive number of nats per token")
            if self.budget is not None:
                raise ValueError(
                    f"tolerance: got {self.tolerance!r} together with budget={self.budget!r}; choose one of the two"
                )
        if self.budget == 0:
            raise ValueError("budget: got 0, expected a mean rank above 0")
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"max_rank: got {self.max_rank!r}, expected at least min_rank={self.min_rank}")
        if self.multiple is not None and self.multiple > self.sketch_rank:
            raise ValueError(
                f"multiple: got {self.multiple!r}, expected at most sketch_rank={self.sketch_rank}, the directions "
                "that a layer may gain at one event; raise sketch_rank with it"
            )
        if self.absent not in ("spectrum", "sketch"):
            raise ValueError(f"absent: got {self.absent!r}, expected 'spectrum' or 'sketch'")
        if not self.hysteresis >= 0:
            raise ValueError(f"hysteresis: got {self.hysteresis!r}, expected at least 0")

    def multiple_at(self, mean: float) -> int:
        """Return the number of which ranks are multiples, for a given mean rank."""
        if self.multiple is not None:
            return self.multiple
        most = min(mean / 4, self.sketch_rank)
        return 1 << int(math.log2(most)) if most >= 1 else 1

    def most_change(self, mean: float) -> int | None:
        """Return the largest change of a rank at one event, for a given mean rank; None for no limit."""
        return None if self.max_change is None else max(self.max_change, self.multiple_at(mean))

    @staticmethod
    def of(given: RankScheduler | Mapping[str, Any]) -> RankScheduler:
        """Return the given scheduler, or build one from a dict of its arguments.

        Raises:
            TypeError: ``given`` is neither, or the dict has an unknown argument.
        """
        if isinstance(given, RankScheduler):
            return given
        if isinstance(given, Mapping):
            return suggests_options(RankScheduler)(**given)
        raise TypeError(
            f"rank_scheduler: got {type(given).__name__}, expected a RankScheduler or a dict of its arguments"
        )

    def next_event(self, step: int) -> int | None:
        """Return the step of the first event at or after ``step``; None if there are no more events."""
        first, last = 1.0, math.inf
        if self.total_steps is not None:
            # Round first, because 0.07 * 100 is slightly more than 7 in floating point.
            first = max(1.0, round(self.start * self.total_steps, 6))
            last = round(self.until * self.total_steps, 6)
        due = max(1, math.ceil(max(step, first) / self.interval)) * self.interval
        return due if due <= last else None

    def budget_at(self, step: int, start: float) -> float:
        """Return the budget at the event after ``step`` steps, as a mean rank.

        Args:
            step: optimizer steps taken so far.
            start: the model's initial mean rank.
        """
        if self.budget is None:
            return start
        if not self.gradual or self.total_steps is None:
            return self.budget
        first = self.next_event(0) or step
        last = round(self.until * self.total_steps, 6) // self.interval * self.interval
        done = (step - first + self.interval) / max(self.interval, last - first + self.interval)
        return start + (self.budget - start) * min(1.0, done)

    def share(self) -> float:
        """Return one event's part of the tolerance, in nats per token.

        All events get equal parts. Without ``total_steps``, each event gets a tenth of the tolerance.

        Raises:
            ValueError: the scheduler has no tolerance.
        """
        if self.tolerance is None:
            raise ValueError("share: expected a scheduler with a tolerance; set RankScheduler(tolerance=...)")
        first = self.next_event(0)
        if self.total_steps is None or first is None:
            return self.tolerance / 10
        last = round(self.until * self.total_steps, 6) // self.interval * self.interval
        return self.tolerance / (1 + (last - first) // self.interval)

    def sketches(self, step: int) -> bool:
        """Return whether the next step is in the sketch window of an event; ``step`` steps were taken so far."""
        due = self.next_event(step + 1)
        return due is not None and due - step <= min(self.window, self.interval)

    def parameters(self, costs: Mapping[str, int], ranks: Mapping[str, int]) -> int:
        """Return the budget as a number of parameters."""
        if self.budget is None:
            return sum(ranks[name] * cost for name, cost in costs.items())
        return int(self.budget * sum(costs.values()) + 1e-6)

    def mean_rank(self, costs: Mapping[str, int], ranks: Mapping[str, int]) -> float:
        """Return the budget as a mean rank, each layer weighted with its cost."""
        return self.parameters(costs, ranks) / sum(costs.values())

    def allocate(
        self,
        utilities: Mapping[str, Sequence[float]],
        costs: Mapping[str, int],
        ranks: Mapping[str, int] | None = None,
        limits: Mapping[str, int] | None = None,
        floors: Mapping[str, int] | None = None,
    ) -> dict[str, int]:
        """Allocate the budget greedily, in the order of utility per parameter, and return the new ranks.

        Args:
            utilities: utilities of each layer's candidate directions, largest first, by layer name.
            costs: parameters of one direction (d_in + d_out), by layer name.
            ranks: current ranks. They define the budget if ``self.budget`` is None.
            limits, floors: largest and smallest number of directions, by layer name.

        Returns:
            New ranks within the budget, by layer name. Ties go to the alphabetically first layer, so the order of
            layers does not matter. The current ranks are returned if they fit and their total utility is at least as
            large. The result is optimal if all costs are equal, and nearly optimal otherwise.

        Raises:
            ValueError: the arguments name different layers, utilities increase, or the budget cannot hold ``min_rank``
                in every layer.
        """
        for what, given in (("utilities", utilities), ("ranks", ranks)):
            if given is not None and set(given) != set(costs):
                raise ValueError(f"{what} and costs name different layers: {sorted(set(given) ^ set(costs))[:5]}")
        for name, worth in utilities.items():
            if not all(a >= b for a, b in pairwise(worth)):
                raise ValueError(
                    f"utilities: got {list(worth)[:8]} for {name!r}, not in falling order; sort them, largest first"
                )
        if ranks is None and self.budget is None:
            raise ValueError(
                "budget: got None, which means the parameters of the current ranks; pass ranks, or set "
                "RankScheduler(budget=...)"
            )
        total = self.parameters(costs, ranks or {})
        mean = self.mean_rank(costs, ranks or {})
        cap = self.max_rank if self.max_rank is not None else max(self.min_rank, math.ceil(4 * mean))
        most = {n: min(cap, len(utilities[n]), (limits or {}).get(n, cap)) for n in costs}
        least = {n: min(max(self.min_rank, (floors or {}).get(n, 0)), most[n]) for n in costs}
        multiple = self.multiple_at(mean)  # a layer whose largest rank is below one multiple gets its largest rank
        most = {n: max(rank - rank % multiple or rank, least[n]) for n, rank in most.items()}
        least = {n: min(rank + -rank % multiple, most[n]) for n, rank in least.items()}
        new = dict(least)
        left = total - sum(new[n] * costs[n] for n in costs)
        if left < 0 and floors:
            return self.allocate(utilities, costs, ranks, limits)  # the budget takes precedence over max_change
        if left < 0:
            raise ValueError(
                f"budget: {total} parameters do not hold min_rank={self.min_rank} in each of {len(costs)} layers, in "
                f"multiples of {multiple}, which needs {total - left}; raise the budget, or lower min_rank or multiple"
            )

        def next_of(name: str) -> tuple[float, str]:
            """Return minus the utility per parameter of a layer's next directions, because heapq is a min-heap."""
            return -sum(utilities[name][new[name] : new[name] + multiple]) / (multiple * costs[name]), name

        queue = [next_of(n) for n in sorted(costs) if new[n] + multiple <= most[n]]
        heapq.heapify(queue)
        while queue:
            _, name = heapq.heappop(queue)
            if multiple * costs[name] > left:
                continue  # this layer's next directions exceed the budget; those of a cheaper layer may still fit
            left -= multiple * costs[name]
            new[name] += multiple
            if new[name] + multiple <= most[name]:
                heapq.heappush(queue, next_of(name))
        fits = ranks is not None and sum(ranks[n] * costs[n] for n in costs) <= total
        if ranks is not None and fits and all(least[n] <= ranks[n] <= most[n] for n in costs):
            before, after = (math.fsum(u for n in costs for u in utilities[n][: r[n]]) for r in (ranks, new))
            return dict(ranks) if before >= after else new
        return new

    def within(
        self,
        utilities: Mapping[str, Sequence[float]],
        costs: Mapping[str, int],
        ranks: Mapping[str, int],
        limits: Mapping[str, int] | None = None,
    ) -> dict[str, int]:
        """Return new ranks, such that the removed directions cost at most an event's :meth:`share` of the tolerance.

        Args:
            utilities: utilities in nats per token, by layer name: first those of the layer's ``ranks`` directions,
                largest first, then the estimates for directions that it does not have.
            costs: parameters of one direction (d_in + d_out), by layer name.
            ranks: current ranks, by layer name.
            limits: largest number of directions, by layer name.

        Raises:
            ValueError: the scheduler has no tolerance.
        """
        multiple = self.multiple_at(sum(ranks[n] * costs[n] for n in costs) / sum(costs.values()))
        have = {name: list(utilities[name][:rank]) for name, rank in ranks.items()}
        least = {name: min(rank, max(self.min_rank, rank // 2)) for name, rank in ranks.items()}
        order = removals(have, costs, multiple, min_rank=least)
        count = bisect_right(cumulative(order), self.share()) - 1
        new = ranks_after(order, count, ranks)
        if self.max_rank is None or count == len(order):
            return new
        price = (1 + self.hysteresis) * order[count].utility / order[count].parameters
        for name, rank in ranks.items():
            following = utilities[name][rank : rank + multiple]
            most = min(self.max_rank, (limits or {}).get(name, self.max_rank))
            full = new[name] == rank and len(following) == multiple and rank + multiple <= most
            if full and math.fsum(following) > price * multiple * costs[name]:
                new[name] = rank + multiple
        return new
