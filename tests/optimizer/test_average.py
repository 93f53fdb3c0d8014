"""The running average of the weights: its value, its exchange with the training weights, checkpoints."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import backward, batch, net, optimizer, same, snapshot, train, trainable

from ctr_optim import CTROptimizer
from ctr_optim.direction.average import AVERAGE, REACH, TRAINING, Average, newest_weight
from ctr_optim.trust_region.bound import Auto, Evidence


def weights_of(count: int) -> list[float]:
    """Return the weight of each of ``count`` weights in the average, in closed form."""
    found = []
    for i in range(1, count + 1):
        weight = min(1.0, REACH / i)
        for later in range(i + 1, count + 1):
            weight *= 1 - min(1.0, REACH / later)
        found.append(weight)
    return found


def test_the_average_is_the_weighted_mean_of_all_steps() -> None:
    model = net()
    opt = optimizer(model, lr=0.05, max_kl=1e-2, average=True)
    seen = []
    for step in range(12):
        train(model, opt, 1, step)
        seen.append(snapshot(model))
    shares = weights_of(12)
    assert sum(shares) == pytest.approx(1) and max(shares) < 0.5 and sum(shares[:4]) < 0.02
    with opt.averaged():
        for name, p in model.named_parameters():
            if p.requires_grad:
                mean = sum(w * s[name] for w, s in zip(shares, seen, strict=True))
                torch.testing.assert_close(p.detach(), mean, rtol=1e-12, atol=1e-14)
    assert same(snapshot(model), seen[-1])


@given(st.integers(1, 10**6))
def test_weights_are_shares(count: int) -> None:
    assert 0 < newest_weight(count) <= 1
    assert newest_weight(count) == 1 or newest_weight(count) == pytest.approx(REACH / count)


def test_training_is_the_same_with_and_without_it() -> None:
    one, two = net(), net()
    a, b = optimizer(one, lr=0.05, max_kl=1e-2), optimizer(two, lr=0.05, max_kl=1e-2, average=True)
    for step in range(6):
        train(one, a, 1, step)
        train(two, b, 1, step)
        with b.averaged(), torch.no_grad():
            two(batch(step)[0])
    assert same(snapshot(one), snapshot(two))


def test_half_precision_weights_come_back_bit_for_bit() -> None:
    model = net(dtype=torch.bfloat16)
    opt = optimizer(model, lr=0.05, max_kl=1e-2, average=True)
    train(model, opt, 8)
    before = snapshot(model)
    assert {opt.state[p][AVERAGE].dtype for p in trainable(model)} == {torch.float32}
    with pytest.raises(KeyError), opt.averaged():
        with opt.averaged():
            assert not same(snapshot(model), before)
        assert not same(snapshot(model), before)  # the inner context leaves the outer one's weights
        raise KeyError
    assert same(snapshot(model), before)
    assert not any(TRAINING in entry for entry in opt.state.values())


def test_a_step_on_the_average_is_refused() -> None:
    model = net()
    opt = optimizer(model, lr=0.05, average=True)
    train(model, opt, 3)
    with opt.averaged():
        backward(model, batch())
        with pytest.raises(RuntimeError, match=r"train outside of averaged\(\)"):
            opt.step()
    opt.step()


def test_the_average_can_replace_the_training_weights() -> None:
    model = net()
    opt = optimizer(model, lr=0.05, average=True)
    train(model, opt, 8)
    before = snapshot(model)
    with opt.averaged():
        mean = snapshot(model)
    opt.use_average()
    assert same(snapshot(model), mean) and not same(mean, before)
    train(model, opt, 1, 8)  # goes on from the average
    with opt.averaged():
        mean = snapshot(model)
        opt.use_average(keep=True)
    assert same(snapshot(model), mean)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_a_checkpoint_resumes_exactly(inside: bool, first: str) -> None:
    def saved(model: Any, opt: CTROptimizer) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
        file.seek(0)
        return file

    whole = net()
    opt = optimizer(whole, lr=0.05, max_kl=1e-2, average=True)
    train(whole, opt, 7)
    if inside:
        with opt.averaged():
            file = saved(whole, opt)
    else:
        file = saved(whole, opt)
    train(whole, opt, 4, 7)

    again = net(seed=1)
    resumed = optimizer(again, lr=0.05, max_kl=1e-2, average=True)
    found = torch.load(file, weights_only=True)
    parts = [("model", again), ("optimizer", resumed)]
    for name, part in parts if first == "model" else parts[::-1]:
        part.load_state_dict(found[name])
    train(again, resumed, 4, 7)
    assert same(snapshot(whole), snapshot(again))
    opt.use_average()
    resumed.use_average()
    assert same(snapshot(whole), snapshot(again))


def test_checkpoints_with_and_without_an_average_are_exchanged() -> None:
    model = net()
    with_one = optimizer(model, lr=0.05, average=True)
    train(model, with_one, 3)
    without = optimizer(model, lr=0.05)
    without.load_state_dict(with_one.state_dict())
    assert not any(AVERAGE in entry for entry in without.state.values())
    train(model, without, 1)
    with_one.load_state_dict(without.state_dict())  # starts an average
    train(model, with_one, 1)
    with with_one.averaged(), pytest.raises(ValueError, match="average=True"):
        without.load_state_dict(with_one.state_dict())


def test_copies_have_their_own_average() -> None:
    model = net()
    opt = optimizer(model, lr=0.05, average=True)
    train(model, opt, 7)
    model2, opt2 = copy.deepcopy((model, opt))
    train(model2, opt2, 3, 7)
    train(model, opt, 3, 7)
    opt.use_average()
    opt2.use_average()
    assert same(snapshot(model), snapshot(model2))


@pytest.mark.parametrize("resize", ["physical", "masked"])
def test_a_rank_event_starts_the_average_again(resize: str) -> None:
    model = net()
    ranks = dict(interval=4, hysteresis=0.0, absent="sketch", window=2, sketch_rank=3)
    opt = optimizer(model, lr=0.05, max_kl=1e-3, rank_scheduler=ranks, resize=resize, average=True)
    events: list[Any] = []
    opt.on_rank_event(events.append)
    train(model, opt, 4)
    assert events
    assert not any(AVERAGE in entry for entry in opt.state.values())
    train(model, opt, 1, 4)
    before = snapshot(model)
    with opt.averaged():
        assert same(snapshot(model), before)  # an average of one


def test_the_bound_falls_later() -> None:
    bound, averaged = Auto(0.1), Auto(0.1)
    averaged.averaged = True
    factors = [each.factors(Evidence(1.0, flat=100))["constant_rate"] for each in (bound, averaged)]
    assert factors == [1 / (1 + 100 / Auto.patience), 1 / (1 + 100 / Auto.averaged_patience)]
    model = net()
    assert CTROptimizer(model.parameters(), model=model, average=True)._bound.averaged


def test_bad_input() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"average: got 5\.0 of type float, expected True or False"):
        CTROptimizer(model.parameters(), average=5.0)  # type: ignore[arg-type]
    opt = optimizer(model)
    with pytest.raises(ValueError, match="average=True"):
        opt.use_average()
    with pytest.raises(ValueError, match="average=True"), opt.averaged():
        pass
    assert Average.of(False) is None
