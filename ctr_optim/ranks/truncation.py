"""Order in which directions are removed from an adapter, and search for the number of removals.

Notation: a layer's directions have utilities ``u_1 >= u_2 >= ... >= u_r``. A utility is the increase of the loss, in
nats per token, when the direction is removed (:mod:`ctr_optim.ranks.valuation`). Each removed direction saves
``d_in + d_out`` parameters. Finding the smallest adapter within a tolerance is a knapsack problem. The greedy solution
removes directions in the order of utility per parameter; it is optimal for layers of equal cost. All functions of this
module are pure functions of numbers.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

ZERO = 1e-12  # fraction of the sum of all utilities at or below which a utility counts as zero


@dataclass(frozen=True)
class Removal:
    """Directions that are removed together.

    Attributes:
        layers: names of the layers that lose directions.
        rank: rank of these layers after the removal.
        utility: sum of the directions' utilities, in nats per token.
        parameters: number of parameters that the removal saves.
    """

    layers: tuple[str, ...]
    rank: int
    utility: float
    parameters: int


def removals(
    utilities: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    multiple: int = 1,
    uniform: bool = False,
    min_rank: int | Mapping[str, int] = 0,
) -> list[Removal]:
    """Return all possible removals in the order of utility per parameter, smallest first.

    Args:
        utilities: utilities of each layer's directions, largest first, by layer name.
        costs: parameters of one direction, by layer name.
        multiple: remaining ranks are multiples of this number.
        uniform: whether each removal cuts all layers to one rank. Layers of smaller rank keep their rank.
        min_rank: smallest rank of a layer: one number, or one for each layer (with ``uniform``, their maximum holds).

    Ties are broken by layer name, so the order of layers does not matter.
    """
    least = min_rank if isinstance(min_rank, Mapping) else dict.fromkeys(utilities, min_rank)
    if uniform:
        most = max((len(u) for u in utilities.values()), default=0)
        levels = _levels(most, multiple, max(least.values(), default=0))
        together = []
        for before, after in zip([most, *levels], levels, strict=False):
            parts = {n: u[after:before] for n, u in sorted(utilities.items()) if len(u) > after}
            saved = sum(len(part) * costs[n] for n, part in parts.items())
            together.append(Removal(tuple(parts), after, math.fsum(x for p in parts.values() for x in p), saved))
        return together
    queues = {n: _of_layer(n, u, costs[n], multiple, least[n]) for n, u in utilities.items()}
    heap = [(_price(queue[0]), name, 0) for name, queue in queues.items() if queue]
    heapq.heapify(heap)
    order = []
    while heap:
        _, name, index = heapq.heappop(heap)
        order.append(queues[name][index])
        if index + 1 < len(queues[name]):
            heapq.heappush(heap, (_price(queues[name][index + 1]), name, index + 1))
    return order


def cumulative(order: Sequence[Removal]) -> list[float]:
    """Return the predicted costs of the first ``0, 1, ..., len(order)`` removals, in nats per token."""
    return [0.0, *accumulate(removal.utility for removal in order)]


def worthless(order: Sequence[Removal]) -> int:
    """Return the number of removals at the front of the order whose utility counts as zero."""
    threshold = ZERO * math.fsum(removal.utility for removal in order)
    return next((i for i, removal in enumerate(order) if removal.utility > threshold), len(order))


def ranks_after(order: Sequence[Removal], count: int, ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks after the first ``count`` removals."""
    after = dict(ranks)
    for removal in order[:count]:
        after |= dict.fromkeys(removal.layers, removal.rank)
    return after


def farthest(
    predicted: Sequence[float],
    measure: Callable[[int], float],
    tolerance: float,
    start: int = 0,
    coupling: float = 1.0,
    close: float = 0.95,
    passes: int = 12,
) -> tuple[int, float]:
    """Return the largest number of removals that costs at most ``tolerance``, and its measured cost.

    The measured cost is close to a power of the predicted cost. Each trial interpolates in the logarithms of both;
    every fourth trial halves the interval instead. The search ends when the cost is at least ``close * tolerance``,
    when two neighbours enclose the tolerance, or after ``passes`` trials. The result is ``start``, or a number whose
    measured cost is at most ``tolerance``.

    Args:
        predicted: predicted costs of 0, 1, ... removals (:func:`cumulative`), in nats per token.
        measure: function that measures the cost of a number of removals, in nats per token. It may be noisy.
        tolerance: largest cost, in nats per token.
        start: number of removals that are known to cost nothing.
        coupling: first guess of the measured over the predicted cost.
        close: fraction of the tolerance at which the search may end.
        passes: largest number of trials.
    """
    low, cost_low, high, cost_high = start, 0.0, len(predicted), math.inf
    for trial in range(passes):
        if high - low <= 1 or cost_low >= close * tolerance:
            break
        aim = 0.5 * (1 + close) * tolerance
        if trial % 4 == 3 and cost_low > 0 and math.isfinite(cost_high):
            count = (low + high) // 2
        elif cost_low > 0 and math.isfinite(cost_high):
            reach = math.log(cost_high / cost_low)
            share = math.log(aim / cost_low) / reach if reach > 0 else 0.5
            span = math.log(predicted[high] / predicted[low])
            count = bisect_right(predicted, predicted[low] * math.exp(share * span)) - 1
        else:
            count = bisect_right(predicted, aim / coupling) - 1
        count = min(max(count, low + 1), high - 1)
        cost = measure(count)
        if predicted[count] > 0 and cost > 0:
            coupling = cost / predicted[count]
        if cost <= tolerance:
            low, cost_low = count, max(cost, 0.0)
        else:
            high, cost_high = count, cost
    return low, cost_low


def _levels(rank: int, multiple: int, least: int) -> list[int]:
    """Return all multiples of ``multiple`` below ``rank`` and not below ``least``, largest first."""
    return [r for r in range(rank - 1, -1, -1) if r % multiple == 0 and r >= least]


def _of_layer(name: str, utilities: Sequence[float], cost: int, multiple: int, least: int) -> list[Removal]:
    levels = _levels(len(utilities), multiple, least)
    return [
        Removal((name,), after, math.fsum(utilities[after:before]), (before - after) * cost)
        for before, after in zip([len(utilities), *levels], levels, strict=False)
    ]


def _price(removal: Removal) -> float:
    return removal.utility / removal.parameters
