"""Truncation: the order in which directions are removed, and the search for their number."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctr_optim.ranks.truncation import cumulative, farthest, ranks_after, removals, worthless

worths = st.lists(st.floats(0, 1), min_size=1, max_size=4).map(lambda u: sorted(u, reverse=True))
layers = st.dictionaries(st.sampled_from("abcde"), worths, min_size=1, max_size=4)


def ranks_of(utilities: dict[str, list[float]]) -> dict[str, int]:
    return {name: len(u) for name, u in utilities.items()}


def lost(utilities: dict[str, list[float]], ranks: dict[str, int]) -> float:
    return math.fsum(x for name, u in utilities.items() for x in u[ranks[name] :])


def within(utilities: dict[str, list[float]], costs: dict[str, int], tolerance: float, **options: object) -> dict:
    """Return the ranks for a tolerance in the quadratic model, whose cost is the sum of the utilities."""
    order = removals(utilities, costs, **options)  # type: ignore[arg-type]
    predicted = cumulative(order)
    count, cost = farthest(predicted, lambda n: predicted[n], tolerance, worthless(order), close=1.0, passes=60)
    assert cost <= tolerance
    return ranks_after(order, count, ranks_of(utilities))


@given(layers, st.floats(1e-3, 3))
def test_the_greedy_choice_is_optimal_for_equal_costs(utilities: dict[str, list[float]], tolerance: float) -> None:
    costs = dict.fromkeys(utilities, 7)
    ranks = within(utilities, costs, tolerance)
    assert lost(utilities, ranks) <= tolerance * (1 + 1e-9)
    choices = itertools.product(*(range(len(u) + 1) for u in utilities.values()))
    fewest = min(
        sum(choice) for choice in choices if lost(utilities, dict(zip(utilities, choice, strict=True))) <= tolerance
    )
    assert sum(ranks.values()) == fewest


@given(layers, st.floats(1e-3, 3), st.integers(1, 3), st.booleans(), st.integers(0, 2))
def test_the_cost_stays_within_the_tolerance(
    utilities: dict[str, list[float]], tolerance: float, multiple: int, uniform: bool, least: int
) -> None:
    costs = {name: 3 + ord(name) % 3 for name in utilities}
    ranks = within(utilities, costs, tolerance, multiple=multiple, uniform=uniform, min_rank=least)
    assert lost(utilities, ranks) <= tolerance * (1 + 1e-9)
    for name, rank in ranks.items():
        before = len(utilities[name])
        assert min(least, before) <= rank <= before
        assert rank == before or rank % multiple == 0
    if uniform:
        changed = {rank for name, rank in ranks.items() if rank < len(utilities[name])}
        assert len(changed) <= 1


@given(layers, st.floats(1e-3, 3))
def test_the_order_of_layers_does_not_matter(utilities: dict[str, list[float]], tolerance: float) -> None:
    costs = {name: 3 + ord(name) % 3 for name in utilities}
    backwards = dict(reversed(utilities.items()))
    assert within(utilities, costs, tolerance) == within(backwards, costs, tolerance)


@given(layers, st.integers(0, 3), st.floats(1e-3, 3))
def test_directions_that_are_worth_nothing_go(utilities: dict[str, list[float]], extra: int, tolerance: float) -> None:
    costs = dict.fromkeys(utilities, 5)
    padded = {name: [*u, *[0.0] * extra] for name, u in utilities.items()}
    assert within(padded, costs, tolerance) == within(utilities, costs, tolerance)
    ranks = within(padded, costs, 1e-300)
    assert all(ranks[name] <= len(utilities[name]) for name in utilities)


@given(layers)
def test_prices_never_fall_along_the_order(utilities: dict[str, list[float]]) -> None:
    costs = {name: 1 + ord(name) % 3 for name in utilities}
    order = removals(utilities, costs)
    prices = [removal.utility / removal.parameters for removal in order]
    assert prices == sorted(prices)
    assert sum(removal.parameters for removal in order) == sum(costs[n] * len(u) for n, u in utilities.items())
    assert ranks_after(order, len(order), ranks_of(utilities)) == dict.fromkeys(utilities, 0)


@given(
    st.lists(st.floats(1e-6, 1), min_size=1, max_size=60),
    st.floats(0.3, 2.0),
    st.floats(-2, 2),
    st.floats(-4, 0.5),
)
def test_the_search_finds_the_tolerance(
    steps: list[float], exponent: float, log_coupling: float, log_tolerance: float
) -> None:
    """The measured cost is an unknown multiple of an unknown power of the predicted cost."""
    predicted = [0.0, *itertools.accumulate(sorted(steps))]
    tolerance, coupling = 10**log_tolerance, 10**log_coupling
    costs = [coupling * p**exponent for p in predicted]
    count, cost = farthest(predicted, costs.__getitem__, tolerance)
    assert cost <= tolerance
    assert cost == (costs[count] if count else 0.0)
    next_one = costs[count + 1] if count + 1 < len(costs) else math.inf
    assert cost >= 0.95 * tolerance or next_one > tolerance


def test_a_cost_that_never_reaches_the_tolerance_removes_everything() -> None:
    assert farthest([0.0, 1.0, 2.0], lambda n: -1.0, 0.1) == (2, 0.0)


def test_a_cost_that_is_infinite_removes_nothing() -> None:
    assert farthest([0.0, 1.0, 2.0], lambda n: math.inf, 0.1) == (0, 0.0)


@pytest.mark.parametrize("rank, expected", [(16, [8, 0]), (12, [8, 0]), (8, [0]), (3, [0])])
def test_multiples(rank: int, expected: list[int]) -> None:
    order = removals({"a": [1.0] * rank}, {"a": 2}, multiple=8)
    assert [removal.rank for removal in order] == expected
