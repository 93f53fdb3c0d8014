"""The running average of the weights: its value, its exchange with the training weights, checkpoints."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import backward, batch, loss_of, net, optimizer, same, snapshot, train, trainable

from ctr_optim import CTROptimizer
from ctr_optim.direction.average import AVERAGE, REACH, TRAINING, Average, newest_weight
from ctr_optim.holdout import Holdout
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


def test_half_precision_does_not_round_the_average() -> None:
    model = net(dtype=torch.bfloat16)
    opt = optimizer(model, lr=0.05, max_kl=1e-2, average=True)
    train(model, opt, 8)
    means = [opt.state[p][AVERAGE].clone() for p in trainable(model)]
    with opt.averaged():
        for p, mean in zip(trainable(model), means, strict=True):
            assert torch.equal(p.detach(), mean.to(p.dtype)) and not torch.equal(p.detach().float(), mean)
    for p, mean in zip(trainable(model), means, strict=True):
        assert torch.equal(opt.state[p][AVERAGE], mean)


def test_other_precisions_need_no_second_copy() -> None:
    model = net(dtype=torch.float32)
    opt = optimizer(model, lr=0.05, average=True)
    train(model, opt, 2)
    with opt.averaged():
        assert not any(TRAINING in entry for entry in opt.state.values())


def test_a_parameter_that_stays_equals_its_average() -> None:
    """The average of a constant is that constant, bit for bit, also if the optimizer got it frozen."""
    model = net(dtype=torch.float32)
    model.up.lora_A.weight.requires_grad_(False)
    opt = CTROptimizer(model.parameters(), model=model, lr=0.05, average=True)
    before = model.up.lora_A.weight.detach().clone()
    train(model, opt, 12)
    opt.close()  # the parameters are stacked again
    train(model, opt, 1, 12)
    opt.use_average()
    assert torch.equal(model.up.lora_A.weight, before)


def test_frozen_and_trained_layers_share_a_stack() -> None:
    model = net(dtype=torch.float32)
    model.up, model.down = (type(model.up)(8, 8, 3, 2.0) for _ in range(2))
    model.embed, model.head = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11)
    model.down.lora_A.weight.requires_grad_(False)
    opt = CTROptimizer(model.parameters(), model=model, lr=0.05, average=True)
    train(model, opt, 2)
    opt.close()
    train(model, opt, 1, 2)


def test_a_step_that_is_skipped_adds_the_unchanged_weights() -> None:
    model = net()
    opt = optimizer(model, lr=0.05, average=True)
    train(model, opt, 7)
    before = snapshot(model)
    backward(model, batch())
    trainable(model)[0].grad.fill_(torch.nan)  # type: ignore[union-attr]
    opt.step()
    assert same(snapshot(model), before)
    with opt.averaged():
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_step_on_the_average_is_refused() -> None:
    model = net()
    opt = optimizer(model, lr=0.05, average=True)
    train(model, opt, 3)
    before = snapshot(model)
    with opt.averaged():
        backward(model, batch())
        with pytest.raises(RuntimeError, match=r"step: .* train outside of averaged\(\)"):
            opt.step()
        with pytest.raises(RuntimeError, match="add_param_group: "):
            opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert same(snapshot(model), before) and len(opt.param_groups) == 1
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


def test_before_the_first_step_the_average_is_the_weights() -> None:
    model = net()
    opt = optimizer(model, lr=0.05, average=True)
    opt.metrics()  # stacks the parameters
    with torch.no_grad():
        trainable(model)[0].add_(1)  # for example, other weights are loaded
    before = snapshot(model)
    with opt.averaged():
        assert same(snapshot(model), before)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_a_checkpoint_resumes_exactly(inside: bool, first: str, dtype: torch.dtype) -> None:
    def saved(model: Any, opt: CTROptimizer) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
        file.seek(0)
        return file

    whole = net(dtype=dtype)
    opt = optimizer(whole, lr=0.05, max_kl=1e-2, average=True)
    train(whole, opt, 7)
    if inside:
        with opt.averaged():
            file = saved(whole, opt)
    else:
        file = saved(whole, opt)
    train(whole, opt, 4, 7)

    again = net(seed=1, dtype=dtype)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_distributed_checkpoint_from_inside_resumes_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    """torch.distributed.checkpoint loads only the keys of a new optimizer's state, and the optimizer first."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    whole = net(dtype=dtype)
    opt = optimizer(whole, lr=0.05, max_kl=1e-2, average=True)
    train(whole, opt, 7)
    with opt.averaged():
        weights, state = get_state_dict(whole, opt)
        dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path, no_dist=True)
    train(whole, opt, 3, 7)

    again = net(seed=1, dtype=dtype)
    resumed = optimizer(again, lr=0.05, max_kl=1e-2, average=True)
    weights, state = get_state_dict(again, resumed)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(again, resumed, model_state_dict=weights, optim_state_dict=state)
    train(again, resumed, 3, 7)
    opt.use_average()
    resumed.use_average()
    assert same(snapshot(whole), snapshot(again))


def test_state_that_moves_after_a_resume_keeps_the_training_weights() -> None:
    model = net()
    opt = optimizer(model, lr=0.05, average=True)
    train(model, opt, 7)
    with opt.averaged():
        found = copy.deepcopy((model.state_dict(), opt.state_dict()))
    model.load_state_dict(found[0])
    opt.load_state_dict(found[1])
    opt.metrics()  # stacks the parameters while they hold the average
    train(model, opt, 1, 7)
    for stack in opt._stack():
        stack.to_(torch.device("cpu", 0), opt.state)  # another device, as far as torch can tell
    train(model, opt, 1, 8)


def test_a_compiled_model_resumes_with_use_training() -> None:
    model = net()
    opt = optimizer(model, lr=0.05, average=True)
    train(model, opt, 7)
    before = snapshot(model)
    with opt.averaged():
        found = copy.deepcopy((model.state_dict(), opt.state_dict()))
    model.load_state_dict(found[0])
    opt.load_state_dict(found[1])
    model.compile(backend="eager")
    backward(model, batch())
    with pytest.raises(RuntimeError, match=r"call use_training\(\)"):
        opt.step()
    opt.use_training()
    assert same(snapshot(model), before)
    train(model, opt, 1)


def test_a_copy_from_inside_trains_on() -> None:
    model = net()
    opt = optimizer(model, lr=0.05, average=True)
    train(model, opt, 7)
    with opt.averaged():
        other, opt2 = copy.deepcopy((model, opt))
    train(model, opt, 2, 7)
    train(other, opt2, 2, 7)
    assert same(snapshot(model), snapshot(other))


def test_a_new_group_starts_the_average_again() -> None:
    model = net()
    halves = [[p for p in trainable(part)] for part in (model.up, model.down)]
    opt = CTROptimizer(halves[0], model=model, lr=0.05, average=True, calibration_interval=None)
    train(model, opt, 20)
    opt.add_param_group({"params": halves[1]})
    seen = []
    for step in range(20, 28):
        train(model, opt, 1, step)
        seen.append(snapshot(model))
    opt.use_average()
    shares = weights_of(8)
    for name, p in model.named_parameters():
        if p.requires_grad:
            mean = sum(w * s[name] for w, s in zip(shares, seen, strict=True))
            torch.testing.assert_close(p.detach(), mean, rtol=1e-12, atol=1e-14)


def test_a_holdout_that_restores_weights_starts_the_average_again() -> None:
    model = net()
    rising = iter(range(100))  # each measured loss is above the last one
    rows = Holdout([batch(50)], loss=lambda m, b: loss_of(m(b[0]), b[1]) * 0 + float(next(rising)))
    opt = optimizer(model, lr=0.05, average=True, holdout=rows)
    train(model, opt, 8)
    restored = snapshot(model)
    with opt.averaged():
        assert same(snapshot(model), restored)
        with pytest.raises(RuntimeError, match="restore_best: "):
            opt.restore_best()
    opt.restore_best()


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
    with opt.averaged():
        pass
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
