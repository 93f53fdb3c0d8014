"""RankScheduler: steps of events, and allocation of a parameter budget."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import net, optimizer, train

from ctr_optim import RankScheduler

WORTH = st.floats(0, 1e3, allow_nan=False) | st.sampled_from([0.0, 1.0])


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Draw layers with current ranks, decreasing utilities, unequal costs, limits and floors."""
    names = draw(st.lists(st.text("abc.1", min_size=1, max_size=4), min_size=1, max_size=6, unique=True))
    ranks = {n: draw(st.integers(1, 5)) for n in names}
    return {
        "utilities": {
            n: sorted(draw(st.lists(WORTH, min_size=r, max_size=r + 4)), reverse=True) for n, r in ranks.items()
        },
        "costs": {n: draw(st.integers(1, 40)) for n in names},
        "ranks": ranks,
        "limits": {n: draw(st.integers(r, 8)) for n, r in ranks.items()},
        "floors": {n: max(1, r - draw(st.integers(0, 3))) for n, r in ranks.items()},
    }


def price(problem: dict[str, Any], ranks: dict[str, int]) -> int:
    return sum(problem["costs"][n] * r for n, r in ranks.items())


def worth(problem: dict[str, Any], ranks: dict[str, int]) -> float:
    return sum(sum(problem["utilities"][n][:r]) for n, r in ranks.items())


@given(problems())
def test_the_budget_the_limits_and_the_floors_hold(problem: dict[str, Any]) -> None:
    new = RankScheduler().allocate(**problem)
    assert new.keys() == problem["ranks"].keys()
    assert price(problem, new) <= price(problem, problem["ranks"])
    for name, rank in new.items():
        most = min(problem["limits"][name], len(problem["utilities"][name]))
        assert problem["floors"][name] <= rank <= most


@given(problems())
@example(  # the direction with the best utility per parameter leaves no budget for the one with the best utility
    {
        "utilities": {"large": [5.0, 4.9], "small": [9.0, 1.0]},
        "costs": {"large": 10, "small": 1},
        "ranks": {"large": 2, "small": 1},
        "limits": {"large": 2, "small": 2},
        "floors": {"large": 1, "small": 1},
    }
)
def test_an_event_never_lowers_the_total_utility(problem: dict[str, Any]) -> None:
    new = RankScheduler().allocate(**problem)
    assert worth(problem, new) >= worth(problem, problem["ranks"]) * (1 - 1e-12)


@given(problems(), st.randoms())
def test_the_order_of_layers_does_not_matter(problem: dict[str, Any], chance: random.Random) -> None:
    names = list(problem["ranks"])
    chance.shuffle(names)
    shuffled = {key: {n: given[n] for n in names} for key, given in problem.items()}
    assert RankScheduler().allocate(**shuffled) == RankScheduler().allocate(**problem)


@given(problems(), st.integers(1, 4), st.integers(0, 4))
def test_min_and_max_rank_hold(problem: dict[str, Any], least: int, more: int) -> None:
    scheduler = RankScheduler(min_rank=least, max_rank=least + more, budget=8.0)
    new = scheduler.allocate(problem["utilities"], problem["costs"])
    for name, rank in new.items():
        candidates = len(problem["utilities"][name])
        assert min(least, candidates) <= rank <= min(least + more, candidates)


@given(problems())
def test_at_equal_costs_the_fill_is_optimal(problem: dict[str, Any]) -> None:
    costs = dict.fromkeys(problem["costs"], 7)
    new = RankScheduler(budget=3.0, max_rank=9).allocate(problem["utilities"], costs)
    rest = sorted((u for us in problem["utilities"].values() for u in us[1:]), reverse=True)
    best = sum(us[0] for us in problem["utilities"].values()) + sum(rest[: 2 * len(costs)])
    assert worth(problem, new) == pytest.approx(best)


@given(problems(), st.integers(1, 4))
def test_ranks_are_multiples(problem: dict[str, Any], multiple: int) -> None:
    """Ranks are multiples except in layers smaller than one multiple, and no affordable multiple stays unused."""
    costs = dict.fromkeys(problem["costs"], 7)
    utilities = problem["utilities"]
    new = RankScheduler(budget=6.0, max_rank=9, multiple=multiple).allocate(utilities, costs)
    most = {n: min(9, len(us)) for n, us in utilities.items()}
    assert all(r % multiple == 0 or r == most[n] < multiple for n, r in new.items())
    left = 6 * len(costs) - sum(new.values())
    assert left >= 0 and (left < multiple or all(new[n] + multiple > most[n] for n in new))
    taken = [sum(us[k : k + multiple]) for n, us in utilities.items() for k in range(multiple, new[n], multiple)]
    open_ = [sum(us[new[n] : new[n] + multiple]) for n, us in utilities.items() if new[n] + multiple <= most[n]]
    assert not taken or not open_ or min(taken) >= max(open_) * (1 - 1e-12)


def test_a_multiple_fits_into_one_event() -> None:
    for multiple, change, expected in ((1, 2, 2), (4, 2, 4), (4, 6, 6), (4, None, None), (None, 2, 8)):
        assert RankScheduler(multiple=multiple, max_change=change).most_change(mean=32.0) == expected
    with pytest.raises(ValueError, match="multiple: got 16, expected at most sketch_rank=8"):
        RankScheduler(multiple=16)
    with pytest.raises(ValueError, match="in multiples of 4"):
        RankScheduler(multiple=4).allocate({"a": [1.0] * 8}, {"a": 3}, {"a": 3})


def test_multiples_are_a_quarter_of_the_mean() -> None:
    means = {0.0: 1, 2.0: 1, 7.9: 1, 8.0: 2, 15.9: 2, 16.0: 4, 32.0: 8, 256.0: 8}
    assert {mean: RankScheduler().multiple_at(mean) for mean in means} == means
    assert RankScheduler(sketch_rank=3).multiple_at(64.0) == 2 and RankScheduler(multiple=3).multiple_at(64.0) == 3
    ranks = {"a": 16, "b": 16}
    new = RankScheduler().allocate({"a": [1.0] * 32, "b": [9.0] * 32}, {"a": 5, "b": 5}, ranks)
    assert new == {"a": 4, "b": 28}


def test_ranks_stay_where_nothing_is_gained() -> None:
    nothing = {"a": [0.0] * 8, "b": [0.0] * 8}
    ranks = {"a": 2, "b": 4}
    assert RankScheduler().allocate(nothing, {"a": 5, "b": 5}, ranks) == ranks


def test_a_budget_below_today_is_obeyed_at_once() -> None:
    utilities = {"a": [4.0, 3.0, 2.0, 1.0], "b": [8.0, 7.0, 6.0, 5.0]}
    new = RankScheduler(budget=2).allocate(utilities, {"a": 5, "b": 5}, {"a": 4, "b": 4}, floors={"a": 3, "b": 3})
    assert new == {"a": 1, "b": 3}


def test_fractions_of_a_rank_count_in_parameters() -> None:
    scheduler = RankScheduler(budget=4.1)
    assert scheduler.parameters({"a": 50, "b": 30}, {}) == 328
    mean = 1 / 3 + 1  # the initial ranks must fit into their own budget despite rounding
    assert RankScheduler(budget=mean).parameters({"a": 3, "b": 3, "c": 3}, {}) == 12


def test_impossible_and_inconsistent_requests() -> None:
    scheduler = RankScheduler(budget=4.0)
    with pytest.raises(ValueError, match="different layers"):
        scheduler.allocate({"a": [1.0]}, {"b": 3})
    with pytest.raises(ValueError, match="ranks and costs name different layers"):
        scheduler.allocate({"a": [1.0]}, {"a": 3}, {"a": 1, "z": 1})
    with pytest.raises(ValueError, match="falling order"):
        scheduler.allocate({"a": [1.0, 2.0]}, {"a": 3})
    with pytest.raises(ValueError, match="falling order"):
        scheduler.allocate({"a": [float("nan"), 2.0]}, {"a": 3})
    with pytest.raises(ValueError, match="pass ranks"):
        RankScheduler().allocate({"a": [1.0]}, {"a": 3})
    with pytest.raises(ValueError, match="do not hold min_rank=3"):
        RankScheduler(min_rank=3).allocate({"a": [1.0] * 4, "b": [1.0] * 4}, {"a": 3, "b": 3}, {"a": 2, "b": 2})


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.5}, {"budget": 0, "min_rank": 0}, {"budget": float("nan")}, {"interval": 0}, {"interval": 2.0},
        {"start": -0.1}, {"until": 1.1}, {"start": 0.7}, {"total_steps": 0}, {"min_rank": -1},
        {"min_rank": 4, "max_rank": 3}, {"max_rank": 2.5}, {"hysteresis": -1}, {"absent": "guess"}, {"window": 0},
        {"sketch_rank": True}, {"max_change": 0}, {"gradual": True},
    ],
)  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RankScheduler(**options)


def test_a_gradual_budget_is_reached_in_equal_parts_at_the_last_event() -> None:
    scheduler = RankScheduler(budget=4, gradual=True, interval=10, start=0.1, until=0.58, total_steps=100)
    due = [step for step in range(100) if scheduler.next_event(step) == step]
    assert due == [10, 20, 30, 40, 50]
    assert [scheduler.budget_at(step, 8.0) for step in due] == pytest.approx([7.2, 6.4, 5.6, 4.8, 4.0])
    assert scheduler.budget_at(60, 8.0) == 4.0
    assert replace(scheduler, gradual=False).budget_at(10, 8.0) == 4.0
    assert RankScheduler().budget_at(10, 8.0) == 8.0
    assert replace(scheduler, total_steps=None).budget_at(10, 8.0) == 4.0  # the budget applies at once


def test_training_ends_at_a_gradual_budget() -> None:
    model = net(rank=6)
    ranks = dict(
        budget=3, gradual=True, interval=2, window=1, until=0.6, total_steps=10, hysteresis=0.0, max_change=None
    )
    opt = optimizer(model, rank_scheduler=ranks, lr=0.01)
    seen = [sum(p.rank * p.cost for p in opt.pairs)]
    for step in range(8):
        train(model, opt, 1, start=step)
        seen.append(sum(p.rank * p.cost for p in opt.pairs))
    size = sum(p.cost for p in opt.pairs)
    assert seen[0] == 6 * size and [seen[n] <= mean * size for n, mean in ((2, 5), (4, 4), (6, 3))] == [True] * 3
    assert seen[2] > 4 * size and seen[8] == seen[6] > 2 * size


def test_an_optimizer_refuses_an_impossible_budget_when_it_is_built() -> None:
    with pytest.raises(ValueError, match="do not hold min_rank=4"):
        optimizer(net(rank=3), rank_scheduler={"min_rank": 4})
    optimizer(net(rank=3), rank_scheduler={"budget": 4, "min_rank": 4})


# -- steps of events --------------------------------------------------------------------------------------------------


def events(scheduler: RankScheduler, steps: int) -> list[int]:
    return [s for s in range(1, steps + 1) if scheduler.next_event(s) == s]


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(interval=10), [10, 20, 30, 40, 50]),
        (dict(interval=10, total_steps=50), [10, 20, 30]),
        (dict(interval=10, total_steps=50, until=1.0), [10, 20, 30, 40, 50]),
        (dict(interval=10, total_steps=50, start=0.3, until=0.5), [20]),
        (dict(interval=10, total_steps=100, start=0.07, until=0.29), [10, 20]),
        (dict(interval=1, total_steps=100, start=0.07, until=0.07), [7]),
        (dict(interval=1, total_steps=100, start=0.28, until=0.29), [28, 29]),
        (dict(interval=60, total_steps=50), []),
        (dict(interval=10, total_steps=50, until=0.0), []),
    ],
)
def test_events_fall_due(options: dict[str, Any], expected: list[int]) -> None:
    assert events(RankScheduler(**options), 50) == expected


@given(st.integers(1, 12), st.integers(1, 15), st.floats(0, 1), st.floats(0, 1), st.integers(1, 80) | st.none())
def test_every_event_is_preceded_by_its_window(
    interval: int, window: int, one: float, other: float, total: int | None
) -> None:
    scheduler = RankScheduler(
        interval=interval, window=window, start=min(one, other), until=max(one, other), total_steps=total
    )
    due = events(scheduler, 90)
    expected = {s for e in due for s in range(e - min(window, interval), e)}
    assert {s for s in range(min(due, default=0), max(due, default=0)) if scheduler.sketches(s)} == {
        s for s in expected if s >= min(due)
    }
    assert all(scheduler.sketches(s) for s in expected)
    assert all(e % interval == 0 for e in due)
    if total is not None:
        assert not due or due[-1] <= total
        assert not any(scheduler.sketches(s) for s in range(total, 90))
