"""Series of overflowed steps, and a closed optimizer."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from support import (
    assert_factors,
    backward,
    batch,
    factors_of,
    finite,
    held,
    loss_of,
    net,
    optimizer,
    same,
    snapshot,
    train,
)

RANKS: dict[str, Any] = dict(interval=4, window=2, hysteresis=0.0, absent="sketch")


def test_a_disabled_scaler_changes_nothing() -> None:
    runs = []
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        model = net()
        opt = optimizer(model)
        backward(model, batch(0))
        opt.step() if scaler is None else scaler.step(opt)
        runs.append(snapshot(model))
    assert same(*runs)


# -- loss scaling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clear", ["optimizer", "model", "zeros"])
def test_a_storm_of_overflows_leaves_no_trace(clear: str) -> None:
    """A skipped step has the effect of no batch, for every way to clear the gradients."""
    model, reference = net(), net()
    opt, other = (optimizer(m, max_kl=1e-3, factor_interval=2) for m in (model, reference))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    step = taken = 0
    while taken < 12:
        storm = step % 7 in (0, 2, 3, 5)
        (opt if clear == "optimizer" else model).zero_grad(set_to_none=clear != "zeros")
        loss = loss_of(model(batch(step)[0]), batch(step)[1])
        scaler.scale(loss).backward()
        if storm:
            model.down.lora_A.weight.grad[0, 0] = math.inf
        scale = scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        assert (scaler.get_scale() < scale) == storm
        if not storm:
            other.zero_grad()
            backward(reference, batch(step))
            other.step()
            taken += 1
        step += 1
        assert held(opt)
    assert opt.steps == other.steps == 12 and opt.metrics()["skipped_steps"] == 0
    assert_factors(factors_of(opt), factors_of(other), 1e-9)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_micro_batches_are_not_mistaken_for_dropped_gradients() -> None:
    """Statistics accumulate over micro-batches, also with gradients set to zero and two forward passes per backward."""
    found = []
    for joint in (False, True):
        model = net()
        opt = optimizer(model)
        losses = [loss_of(model(batch(i)[0]), batch(i)[1]) / 2 for i in range(2)] if joint else []
        for i in range(2):
            (losses[i] if joint else loss_of(model(batch(i)[0]), batch(i)[1]) / 2).backward()
        opt.step()
        found.append(factors_of(opt))
    assert_factors(found[0], found[1], 1e-12)


# -- a closed optimizer ------------------------------------------------------------------------------------------------


def test_a_closed_optimizer_stays_closed() -> None:
    """A closed optimizer has no hooks, rank events or warnings; it steps with its last factors and ranks."""
    model = net()
    opt = optimizer(model, max_kl=1e-3, calibration_interval=2, rank_scheduler=RANKS)
    train(model, opt, 2)
    opt.close()
    opt.close()
    before, ranks, weights = factors_of(opt), opt.metrics()["ranks"], snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2, 14):
            train(model, opt, 1, step)
            assert not opt._curvature.taps.enabled and held(opt)
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
    assert not any(getattr(m, kind) for m in model.modules() for kind in kinds)
    assert_factors(factors_of(opt), before, 1e-12)
    assert opt.metrics()["ranks"] == ranks and not same(weights, snapshot(model))
    assert not any("sketch_range" in opt.state[pair.B] for pair in opt.pairs)


def test_an_optimizer_closed_before_its_first_step() -> None:
    model = net()
    opt = optimizer(model)
    opt.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, 3)
    assert finite(model)
