"""RankScheduler: a budget and utilities in, ranks out. Pure, deterministic, the same on every process."""

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
    """When ranks move, and how a budget of parameters is shared out.

    Args:
        budget: mean rank over layers (each layer counts with its own cost), or None for what the model starts with.
        gradual: the budget is reached in equal parts from the model's own ranks, at the last event (needs
            ``total_steps``); else at the first event. Allocate twice the budget, and the final adapter is chosen from
            twice the directions.
        interval: steps between events.
        start, until: first and last event, as fractions of ``total_steps``.
        total_steps: length of the training; None: events never stop.
        min_rank, max_rank: of every layer; ``max_rank=None`` is four times the mean. With ``min_rank=0`` a layer may be
            dropped (its weights are zero; :func:`ctr_optim.export_compact` leaves it out) and come back. Where ranks
            are masked (see ``resize``), no layer gets more than it was allocated with.
        hysteresis: a direction that exists counts for ``1 + hysteresis`` times its utility, so that ranks do not
            swing to and fro on noise.
        absent: what a direction that a layer lacks is taken to be worth. ``"spectrum"``: what the fall of the layer's
            own utilities promises for the next one; ``"sketch"``: what the sketched gradient says that it would gain.
        max_change: the most by which a rank rises or falls at one event, ``multiple`` at least; None for no limit.
        multiple: ranks are multiples of this; None for a quarter of the mean rank, as a power of two: 1 below 8, 2 at
            8, 4 at 16. Layers of one shape and rank are worked on at once, and half precision multiplies slower by odd
            ranks than by multiples of 8.
        window: steps before each event on which the gradient is sketched.
        sketch_rank: candidate directions that a layer may gain at one event.
        tolerance: nats per token that all events together may cost, in place of a budget: at each event, the directions
            that are worth least per parameter go, as many as fit into the event's share. The cost is predicted, through
            the coupling of the whole adapter that the optimizer measures. Training then wins back some of it. Allocate
            more directions than you need. A layer loses at most half of its directions in one event. Layers grow only
            where ``max_rank`` is given: one that lost nothing, and whose next direction promises ``1 + hysteresis``
            times the price at which others keep theirs.
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
                "gradual: got True without a budget to reach; set RankScheduler(budget=...), the mean rank"
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
        """Return the number that ranks are multiples of, for a mean rank."""
        if self.multiple is not None:
            return self.multiple
        most = min(mean / 4, self.sketch_rank)
        return 1 << int(math.log2(most)) if most >= 1 else 1

    def most_change(self, mean: float) -> int | None:
        """Return ``max_change``, but at least one multiple, for a mean rank."""
        return None if self.max_change is None else max(self.max_change, self.multiple_at(mean))

    @staticmethod
    def of(given: RankScheduler | Mapping[str, Any]) -> RankScheduler:
        """A scheduler, or one from a config's dict of its arguments."""
        if isinstance(given, RankScheduler):
            return given
        if isinstance(given, Mapping):
            return suggests_options(RankScheduler)(**given)
        raise TypeError(
            f"rank_scheduler: got {type(given).__name__}, expected a RankScheduler or a dict of its arguments"
        )

    def next_event(self, step: int) -> int | None:
        """The first event at or after ``step`` steps taken; None when there are no more."""
        first, last = 1.0, math.inf
        if self.total_steps is not None:
            # rounded: 0.07 * 100 is a little more than 7
            first = max(1.0, round(self.start * self.total_steps, 6))
            last = round(self.until * self.total_steps, 6)
        due = max(1, math.ceil(max(step, first) / self.interval)) * self.interval
        return due if due <= last else None

    def budget_at(self, step: int, start: float) -> float:
        """The budget as a mean rank, at the event after ``step`` steps.

        Args:
            start: the mean rank that the model started with.
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
        """Nats per token of the tolerance that one event may spend: equal parts, a tenth where events never stop."""
        if self.tolerance is None:
            raise ValueError("share: this scheduler has no tolerance")
        first = self.next_event(0)
        if self.total_steps is None or first is None:
            return self.tolerance / 10
        last = round(self.until * self.total_steps, 6) // self.interval * self.interval
        return self.tolerance / (1 + (last - first) // self.interval)

    def sketches(self, step: int) -> bool:
        """Whether the step that is about to be taken (``step`` taken so far) is in the window before an event."""
        due = self.next_event(step + 1)
        return due is not None and due - step <= min(self.window, self.interval)

    def parameters(self, costs: Mapping[str, int], ranks: Mapping[str, int]) -> int:
        """The budget in parameters."""
        if self.budget is None:
            return sum(ranks[name] * cost for name, cost in costs.items())
        return int(self.budget * sum(costs.values()) + 1e-6)

    def mean_rank(self, costs: Mapping[str, int], ranks: Mapping[str, int]) -> float:
        """The budget as a mean rank, each layer counting with its own cost."""
        return self.parameters(costs, ranks) / sum(costs.values())

    def allocate(
        self,
        utilities: Mapping[str, Sequence[float]],
        costs: Mapping[str, int],
        ranks: Mapping[str, int] | None = None,
        limits: Mapping[str, int] | None = None,
        floors: Mapping[str, int] | None = None,
    ) -> dict[str, int]:
        """Share out the budget: the most useful direction per parameter first.

        Args:
            utilities: for each layer, its candidate directions' utilities, largest first.
            costs: for each layer, parameters a direction costs (d_in + d_out).
            ranks: today's ranks; the budget when ``self.budget`` is None.
            limits, floors: for each layer, the most and the fewest directions that it can hold.

        Returns:
            the new ranks; never over budget. Ties go to the layer that is named first in the alphabet, so that the
            order of layers does not matter. Today's ranks stay where they fit and nothing better is found (the fill is
            optimal where all costs are equal, and nearly so elsewhere).

        Raises:
            ValueError: unknown layers, utilities that rise, or a budget too small for ``min_rank`` everywhere.
        """
        for what, given in (("utilities", utilities), ("ranks", ranks)):
            if given is not None and set(given) != set(costs):
                raise ValueError(f"{what} and costs name different layers: {sorted(set(given) ^ set(costs))[:5]}")
        for name, worth in utilities.items():
            if not all(a >= b for a, b in pairwise(worth)):
                raise ValueError(f"utilities: those of {name!r} are not in falling order: {list(worth)[:8]}")
        if ranks is None and self.budget is None:
            raise ValueError("budget: None means today's parameters; pass ranks, or set RankScheduler(budget=...)")
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
            return self.allocate(utilities, costs, ranks, limits)  # a shrunken budget wins over gradual change
        if left < 0:
            raise ValueError(
                f"budget: {total} parameters do not hold min_rank={self.min_rank} in each of {len(costs)} layers, in "
                f"multiples of {multiple} ({total - left} needed); raise the budget or lower min_rank or multiple"
            )

        def next_of(name: str) -> tuple[float, str]:
            """Minus the worth per parameter of a layer's next directions, so that the smallest comes first."""
            return -sum(utilities[name][new[name] : new[name] + multiple]) / (multiple * costs[name]), name

        queue = [next_of(n) for n in sorted(costs) if new[n] + multiple <= most[n]]
        heapq.heapify(queue)
        while queue:
            _, name = heapq.heappop(queue)
            if multiple * costs[name] > left:
                continue  # this layer is full; a cheaper one may still fit
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
        """Return ranks whose missing directions are worth at most an event's :meth:`share` of the tolerance.

        Args:
            utilities: for each layer, in nats per token, those of its ``ranks`` directions, largest first, followed by
                those that directions which it lacks promise.
            costs: for each layer, parameters a direction costs (d_in + d_out).
            limits: for each layer, the most directions that it can hold.
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
