"""Which directions an adapter can do without: an order of removal, and how far to follow it.

Notation: a layer's directions have utilities ``u_1 >= u_2 >= ... >= u_r``, the nats per token that the loss rises when
one of them goes (:mod:`ctr_optim.ranks.valuation`), and each saves ``d_in + d_out`` parameters. The smallest adapter
within a tolerance is a knapsack: directions go in the order of utility per parameter saved. For layers of equal cost
this order is optimal. Everything here is a pure function of numbers.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

ZERO = 1e-12  # of the sum of all utilities: below, a direction is worth nothing


@dataclass(frozen=True)
class Removal:
    """Some directions that go together.

    Attributes:
        layers: the layers that lose directions.
        rank: the rank that these layers have afterwards.
        utility: what the directions are worth together, nats per token.
        parameters: what they save together.
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
    """Return every removal that can be made, in the order of utility per parameter, cheapest first.

    Args:
        utilities: for each layer, its directions' utilities, largest first.
        costs: for each layer, the parameters of one direction.
        multiple: ranks that remain are multiples of this number.
        uniform: all layers have one rank afterwards (or the smaller rank that they had).
        min_rank: no layer falls below this rank; one for all, or (not with ``uniform``) one for each.

    Ties go by the layers' names, so that the order of layers does not matter.
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
    """Return the predicted cost, in nats per token, of the first ``0, 1, ..., len(order)`` removals."""
    return [0.0, *accumulate(removal.utility for removal in order)]


def worthless(order: Sequence[Removal]) -> int:
    """Return how many removals at the front of the order are worth nothing."""
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

    The measured cost is close to a power of the predicted one. Each trial interpolates in the logarithms of both, or
    halves the interval where interpolation makes no progress. The search ends where the cost is at least
    ``close * tolerance``, where two neighbours enclose the tolerance, or after ``passes`` trials. Whatever ends it, the
    returned number of removals has been measured, and costs at most ``tolerance``.

    Args:
        predicted: of :func:`cumulative`.
        measure: the cost of a number of removals; it may be noisy.
        start: removals that are known to cost nothing.
        coupling: a first guess of measured over predicted cost.
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
    """Return the smaller ranks that a layer of ``rank`` may have: multiples, largest first, down to ``least``."""
    return [r for r in range(rank - 1, -1, -1) if r % multiple == 0 and r >= least]


def _of_layer(name: str, utilities: Sequence[float], cost: int, multiple: int, least: int) -> list[Removal]:
    levels = _levels(len(utilities), multiple, least)
    return [
        Removal((name,), after, math.fsum(utilities[after:before]), (before - after) * cost)
        for before, after in zip([len(utilities), *levels], levels, strict=False)
    ]


def _price(removal: Removal) -> float:
    return removal.utility / removal.parameters
