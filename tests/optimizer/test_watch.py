"""Warnings for training without gradients, and for a learning rate that never reaches the bound."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from support import net, optimizer, train, trainable

from ctr_optim import CTROptimizer

IDLE, SMALL = "no parameter has had a gradient", "so small that the trust region never acts"


def said(act: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught if IDLE in str(w.message) or SMALL in str(w.message)]


def test_steps_without_any_gradient_are_told_once() -> None:
    opt = optimizer(net())
    assert not said(lambda: [opt.step() for _ in range(2)])
    assert len(said(lambda: [opt.step() for _ in range(8)])) == 1


def test_a_pause_in_training_is_not_told() -> None:
    model = net()
    opt = optimizer(model)
    train(model, opt, 1)
    opt.zero_grad()
    assert not said(lambda: [opt.step() for _ in range(8)])


@pytest.mark.parametrize("lr, steps, expected", [(2e-5, 19, 0), (2e-5, 20, 1), (2e-5, 60, 1), (0.08, 45, 0)])
def test_a_rate_that_never_reaches_the_bound_is_told_once(lr: float, steps: int, expected: int) -> None:
    model = net(dtype=torch.float32)
    opt = CTROptimizer(trainable(model), lr=lr, model=model, kl_schedule="lr")
    assert len(said(lambda: train(model, opt, steps))) == expected


def test_a_rate_that_sets_no_length_is_not_blamed() -> None:
    model = net(dtype=torch.float32)
    opt = CTROptimizer(trainable(model), max_kl=1e6, model=model)
    assert not said(lambda: train(model, opt, 41))
    assert opt.metrics()["trust/predicted_kl"] < 1e4


def test_warm_up_and_decay_are_not_taken_for_a_small_rate() -> None:
    model = net(dtype=torch.float32)
    opt = CTROptimizer(trainable(model), lr=0.08, model=model, kl_schedule="constant")

    def run() -> None:
        for step in range(41):
            opt.param_groups[0]["initial_lr"] = 0.08
            opt.param_groups[0]["lr"] = 1e-5
            train(model, opt, 1, step)

    assert not said(run)


def test_without_a_bound_the_rate_is_the_users() -> None:
    model = net(dtype=torch.float32)
    opt = CTROptimizer(trainable(model), lr=2e-5, max_kl=None, model=model)
    assert not said(lambda: train(model, opt, 41))
