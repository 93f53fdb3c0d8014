"""RankScheduler(tolerance=...): a largest cost of all events in nats, in place of a budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import llama_batch, llama_loss, tiny_llama, trainable
from torch import nn

from ctr_optim import CTROptimizer, RankEvent, RankScheduler
from ctr_optim.model.pair import ranks_in_use

WORTH = st.floats(0, 1)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Draw layers with ranks, and decreasing utilities of their directions and of some absent ones."""
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True))
    ranks = {n: draw(st.integers(0, 9)) for n in names}
    more = {n: draw(st.integers(0, 4)) for n in names}
    lists = {n: st.lists(WORTH, min_size=ranks[n] + more[n], max_size=ranks[n] + more[n]) for n in names}
    return {
        "utilities": {n: sorted(draw(lists[n]), reverse=True) for n in names},
        "costs": {n: draw(st.integers(1, 9)) for n in names},
        "ranks": ranks,
    }


def lost(problem: dict[str, Any], new: dict[str, int]) -> float:
    return math.fsum(x for n, u in problem["utilities"].items() for x in u[new[n] : problem["ranks"][n]])


@given(problems(), st.floats(1e-3, 3), st.integers(0, 2))
def test_an_event_stays_within_its_share(problem: dict[str, Any], tolerance: float, least: int) -> None:
    scheduler = RankScheduler(tolerance=tolerance, min_rank=least)
    new = scheduler.within(**problem)
    assert lost(problem, new) <= scheduler.share() * (1 + 1e-9)
    for name, rank in problem["ranks"].items():
        assert min(rank, max(least, rank // 2)) <= new[name] <= rank  # a layer loses at most half, and no layer grows


@given(problems(), st.floats(1e-3, 3))
def test_the_order_of_layers_does_not_matter(problem: dict[str, Any], tolerance: float) -> None:
    backwards = {key: dict(reversed(value.items())) for key, value in problem.items()}
    scheduler = RankScheduler(tolerance=tolerance, max_rank=12, hysteresis=0.5)
    assert scheduler.within(**problem) == scheduler.within(**backwards)


def test_a_full_and_useful_layer_grows_up_to_max_rank() -> None:
    problem: dict[str, Any] = {
        "utilities": {"full": [9.0, 9.0, 9.0, 9.0], "idle": [9.0, 0.5, 0.25, 0.125]},
        "costs": {"full": 2, "idle": 2},
        "ranks": {"full": 2, "idle": 3},
    }
    scheduler = RankScheduler(tolerance=4.0, multiple=1)  # without total_steps, an event gets a tenth
    assert scheduler.within(**problem) == {"full": 2, "idle": 2}
    for most, expected in ((3, 3), (2, 2)):
        grows = RankScheduler(tolerance=4.0, multiple=1, max_rank=most)
        assert grows.within(**problem) == {"full": expected, "idle": 2}
    assert RankScheduler(tolerance=4.0, multiple=1, max_rank=3, hysteresis=99.0).within(**problem)["full"] == 2
    limited = RankScheduler(tolerance=4.0, multiple=1, max_rank=3).within(**problem, limits={"full": 2, "idle": 3})
    assert limited["full"] == 2


@pytest.mark.parametrize("options", [{}, {"start": 0.2}, {"until": 1.0}, {"interval": 33}], ids=str)
def test_all_events_together_spend_the_tolerance(options: dict[str, Any]) -> None:
    scheduler = RankScheduler(tolerance=0.03, total_steps=1000, **options)
    events = {e for step in range(1001) if (e := scheduler.next_event(step)) is not None}
    assert len(events) * scheduler.share() == pytest.approx(0.03)
    assert RankScheduler(tolerance=0.03).share() == pytest.approx(0.003)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"tolerance": 0.0}, "tolerance: got 0.0, expected a positive number of nats"),
        ({"tolerance": -1.0}, "tolerance: got -1.0, expected a positive number of nats"),
        ({"tolerance": math.inf}, "tolerance: got inf, expected a positive number of nats"),
        ({"tolerance": 0.1, "budget": 4}, "tolerance: got 0.1 together with budget=4; choose one"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RankScheduler(**options)


def built(model: nn.Module, **options: Any) -> CTROptimizer:
    """Return an optimizer with four events in its first twelve steps."""
    ranks: dict[str, Any] = dict(interval=3, window=2, sketch_rank=4, tolerance=2e-3, total_steps=12, until=1.0)
    return CTROptimizer(trainable(model), lr=0.02, rank_scheduler={**ranks, **options.pop("ranks", {})}, **options)


def go(model: nn.Module, opt: CTROptimizer, steps: int) -> list[RankEvent]:
    heard: list[RankEvent] = []
    opt.on_rank_event(heard.append)
    for step in range(steps):
        opt.zero_grad()
        llama_loss(model, llama_batch(step)).backward()
        opt.step()
    return heard


@pytest.mark.parametrize("resize", ["physical", "masked"])
@pytest.mark.parametrize("calibration", [None, 3])
def test_ranks_fall_and_training_goes_on(resize: str, calibration: int | None) -> None:
    model = tiny_llama(torch.float64, r=8, lora_alpha=16)
    opt = built(model, resize=resize, calibration_interval=calibration)
    before = dict(opt.ranks)
    heard = go(model, opt, 14)
    assert heard and all(e.reason == "shrink" and e.new_rank >= e.old_rank // 2 for e in heard)
    assert sum(opt.ranks.values()) < sum(before.values())
    assert dict(zip((p.name for p in opt.pairs), ranks_in_use(opt.pairs), strict=True)) == opt.ranks
    if resize == "masked":
        assert {p.rank for p in opt.pairs} == {8}
    else:
        assert {p.name: p.rank for p in opt.pairs} == opt.ranks
    assert max(e.step for e in heard) <= 12


def test_masked_is_physical() -> None:
    ranks = []
    for resize in ("physical", "masked"):
        model = tiny_llama(torch.float64, r=8, lora_alpha=16)
        opt = built(model, resize=resize)
        go(model, opt, 13)
        ranks.append(dict(opt.ranks))
    assert ranks[0] == ranks[1]


def test_a_larger_coupling_leaves_more() -> None:
    """The coupling converts utilities to nats, so a larger coupling removes fewer directions."""
    left = []
    for coupling in (1.0, 30.0):
        model = tiny_llama(torch.float64, r=8, lora_alpha=16)
        opt = built(model, calibration_interval=None)
        saved = opt.state_dict()
        saved["param_groups"][0]["ctr"]["base_coupling"] = coupling
        opt.load_state_dict(saved)
        go(model, opt, 13)
        left.append(sum(opt.ranks.values()))
    assert left[0] < left[1]


def test_an_event_without_a_coupling_refuses_nats() -> None:
    model = tiny_llama(torch.float64, r=8)
    opt = built(model)
    assert opt._ranks is not None
    with pytest.raises(ValueError, match="tolerance is in nats, and the optimizer has not measured the coupling"):
        type(opt._ranks).event(opt._ranks, opt.blocks, opt.state, 3, False)
