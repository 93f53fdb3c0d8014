"""Rank events: listeners that raise, skipped steps, and utilities without the hysteresis factor."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import backward, batch, net, optimizer, same, snapshot, train

from ctr_optim import CTROptimizer, RankEvent, RankScheduler
from ctr_optim.report.log import EventLog

RANKS: dict[str, Any] = dict(interval=4, window=2, sketch_rank=3, hysteresis=0.0, absent="sketch")


def build(model: torch.nn.Module, **ranks: Any) -> CTROptimizer:
    return optimizer(model, lr=0.05, max_kl=1e-3, rank_scheduler=RankScheduler(**{**RANKS, **ranks}))


def test_a_listener_that_raises_leaves_an_optimizer_that_works() -> None:
    model, plain = net(), net()
    opt, reference = build(model), build(plain)
    heard: list[RankEvent] = []

    disk_is_full = True

    def fails(event: RankEvent) -> None:
        if disk_is_full:
            raise OSError("disk full")

    opt.on_rank_event(fails)
    opt.on_rank_event(heard.append)
    train(model, opt, 3)
    with pytest.raises(OSError, match="disk full"):
        train(model, opt, 1, 3)
    train(plain, reference, 4)
    assert heard and opt.steps == 4 and opt.ranks == reference.ranks
    disk_is_full = False
    train(model, opt, 6, 4)
    train(plain, reference, 6, 4)
    assert same(snapshot(model), snapshot(plain))


def test_an_event_log_that_cannot_be_written_leaves_an_optimizer_that_works(tmp_path: Path) -> None:
    model, plain = net(), net()
    opt, reference = build(model), build(plain)
    log = EventLog(opt, tmp_path / "run" / "events.jsonl")
    train(model, opt, 3)
    log.path.unlink()
    log.path.mkdir()  # opening a directory as a file fails for any user
    with pytest.raises(OSError):
        train(model, opt, 1, 3)
    log.path.rmdir()
    train(model, opt, 6, 4)
    train(plain, reference, 10)
    assert same(snapshot(model), snapshot(plain))
    assert all(json.loads(line)["event"] == "rank" for line in log.path.read_text().splitlines())


def test_an_event_that_fails_leaves_an_optimizer_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    opt = build(model)
    train(model, opt, 3)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="connection lost"):
        patch.setattr("ctr_optim.ranks.allocation.copy_first_", _fails)
        train(model, opt, 1, 3)
    train(model, opt, 6, 4)
    assert all(p.isfinite().all() for p in model.parameters())
    assert opt.ranks == {pair.name: pair.rank for pair in opt.pairs}


def _fails(*_: Any) -> None:
    raise RuntimeError("connection lost")


@pytest.mark.parametrize("through_checkpoint", [False, True])
def test_skipped_steps_are_not_among_those_that_a_sketch_sums_over(through_checkpoint: bool) -> None:
    model = net()
    opt = build(model, interval=8, window=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, weight in enumerate([1.0, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0]):
            opt.zero_grad()
            backward(model, batch(step), weight=weight)
            opt.step()
        saved = opt.state_dict()
    assert saved["param_groups"][0]["ctr"]["sketched"] == 2
    if through_checkpoint:
        weights, model = model.state_dict(), net(seed=7)
        model.load_state_dict(weights)
        opt = build(model, interval=8, window=4)
        opt.load_state_dict(saved)
        assert opt.state_dict()["param_groups"][0]["ctr"]["sketched"] == 2
    opt.zero_grad()
    backward(model, batch(7))
    opt.step()
    assert opt.state_dict()["param_groups"][0]["ctr"]["sketched"] == 3


def test_the_utility_of_an_event_is_free_of_hysteresis() -> None:
    """With a budget of one direction for each of two layers, hysteresis changes no choice."""
    worth = []
    for hysteresis in (0.0, 3.0):
        model = net()
        opt = build(model, hysteresis=hysteresis, budget=1.0, max_change=None, absent="spectrum")
        heard: list[RankEvent] = []
        opt.on_rank_event(heard.append)
        train(model, opt, 4)
        assert {e.new_rank for e in heard} == {1} and {e.kept for e in heard} == {1}
        worth.append({e.name: e.utility for e in heard})
    assert worth[0].keys() == worth[1].keys() and worth[0]
    assert worth[1] == pytest.approx(worth[0], rel=1e-9)
