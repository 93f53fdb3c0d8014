"""A run that is saved, loaded and continued equals an uninterrupted run, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    backward,
    batch,
    factors_of,
    net,
    optimizer,
    plain_bound,
    same,
    snapshot,
    tiny_llama,
    train,
    trainable,
    weights_of,
)
from torch import nn

from ctr_optim import CTROptimizer

UNEVEN: dict[str, Any] = dict(
    lr=0.05, weight_decay=0.1, max_kl=1e-3, factor_interval=3, basis_interval=4, calibration_interval=5
)


def through_disk(state: dict[str, Any]) -> dict[str, Any]:
    """Save and load a state as a Trainer does."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def restored(model: nn.Module, opt: CTROptimizer, disk: bool, **options: Any) -> tuple[nn.Module, CTROptimizer]:
    """Return a new model and optimizer with the saved state of old ones."""
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    fresh = net(seed=99, dtype=next(model.parameters()).dtype)
    fresh.load_state_dict(weights)
    other = optimizer(fresh, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(through_disk(state) if disk else state)
    return fresh, other


def equal_states(a: CTROptimizer, b: CTROptimizer) -> bool:
    for p, q in zip(_parameters(a), _parameters(b), strict=True):
        mine, theirs = a.state[p], b.state[q]
        if mine.keys() != theirs.keys():
            return False
        for key in mine:
            if mine[key].dtype != theirs[key].dtype or not torch.equal(mine[key], theirs[key]):
                return False
    return True


def _parameters(opt: CTROptimizer) -> list[nn.Parameter]:
    return [p for group in opt.param_groups for p in group["params"]]


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("structure", ["diagonal", "dense", "lowrank"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resuming_is_exact(dtype: torch.dtype, structure: str, disk: bool) -> None:
    options = {**UNEVEN, "factor_structure": structure}
    model = net(dtype=dtype)
    opt = optimizer(model, **options)
    train(model, opt, 5)  # stops between two updates of factors, bases and coupling
    fresh, other = restored(model, opt, disk, **options)
    train(model, opt, 7, start=5)
    train(fresh, other, 7, start=5)
    assert same(snapshot(model), snapshot(fresh))
    assert equal_states(opt, other)
    assert opt.metrics() == other.metrics()


@pytest.mark.parametrize("stop", range(1, 7))
def test_resuming_is_exact_wherever_it_stops(stop: int) -> None:
    model = net()
    opt = optimizer(model, **UNEVEN)
    train(model, opt, stop)
    fresh, other = restored(model, opt, True, **UNEVEN)
    train(model, opt, 5, start=stop)
    train(fresh, other, 5, start=stop)
    assert same(snapshot(model), snapshot(fresh))


def test_resuming_with_a_scheduler() -> None:
    def make(model: nn.Module) -> tuple[CTROptimizer, Any]:
        opt = optimizer(model, lr=0.5, max_kl=1e-3)
        return opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))

    def go(model: nn.Module, opt: CTROptimizer, schedule: Any, steps: range) -> None:
        for step in steps:
            train(model, opt, 1, step)
            schedule.step()

    model = net()
    opt, schedule = make(model)
    go(model, opt, schedule, range(3))
    fresh = net(seed=5)
    fresh.load_state_dict(model.state_dict())
    other, second = make(fresh)
    other.load_state_dict(through_disk(opt.state_dict()))
    second.load_state_dict(schedule.state_dict())
    go(model, opt, schedule, range(3, 6))
    go(fresh, other, second, range(3, 6))
    assert same(snapshot(model), snapshot(fresh))
    assert opt.metrics()["trust/max_kl"] == other.metrics()["trust/max_kl"] == pytest.approx(1e-3 / 36)


def test_resuming_a_peft_model_in_bfloat16(tmp_path: Path) -> None:
    from support import llama_batch, llama_loss

    def go(model: nn.Module, opt: CTROptimizer, steps: range) -> None:
        for step in steps:
            opt.zero_grad()
            llama_loss(model, llama_batch(step)).backward()
            opt.step()

    model = tiny_llama(torch.bfloat16)
    opt = optimizer(model, **UNEVEN)
    go(model, opt, range(2))
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    fresh = tiny_llama(torch.bfloat16, seed=4)
    fresh.load_state_dict(saved["model"])
    other = optimizer(fresh, **UNEVEN)
    other.load_state_dict(saved["optimizer"])
    go(model, opt, range(2, 4))
    go(fresh, other, range(2, 4))
    assert same(snapshot(model), snapshot(fresh))
    for p in trainable(fresh):
        assert p.dtype == torch.bfloat16
        assert all(t.dtype == torch.float32 for t in other.state[p].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_ones_own_state_changes_nothing(dtype: torch.dtype) -> None:
    """Accelerate loads the state of every optimizer that it prepares into the same optimizer."""
    model, plain = net(dtype=dtype), net(dtype=dtype)
    opt, reference = optimizer(model, **UNEVEN), optimizer(plain, **UNEVEN)
    opt.load_state_dict(opt.state_dict())
    for step in range(6):
        train(model, opt, 1, step)
        train(plain, reference, 1, step)
        opt.load_state_dict(opt.state_dict())
        opt.load_state_dict(opt.state_dict())
    assert same(snapshot(model), snapshot(plain))
    assert equal_states(opt, reference)


def test_a_loaded_state_shares_no_memory_with_the_checkpoint() -> None:
    model = net()
    opt = optimizer(model, **UNEVEN)
    train(model, opt, 3)
    state = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(state)
    fresh = net()
    other = optimizer(fresh, **UNEVEN)
    other.load_state_dict(state)
    train(fresh, other, 3)
    assert state["param_groups"][0]["ctr"] == kept["param_groups"][0]["ctr"]
    for key, entry in state["state"].items():
        assert all(torch.equal(entry[k], kept["state"][key][k]) for k in entry)


@pytest.mark.parametrize("kind", ["rank", "groups", "parameters", "empty"])
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded(kind: str) -> None:
    strange = net(rank=4)
    foreign = optimizer(strange, **UNEVEN)
    train(strange, foreign, 2)
    state = foreign.state_dict()
    if kind == "groups":
        extra = {**state["param_groups"][0], "params": [9]}
        state = {"state": state["state"], "param_groups": [*state["param_groups"], extra]}
    elif kind == "parameters":
        group = state["param_groups"][0]
        state = {"state": state["state"], "param_groups": [{**group, "params": group["params"][:-1]}]}
    elif kind == "empty":
        state = {}
    model = net()
    opt = optimizer(model, **UNEVEN)
    train(model, opt, 2)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="checkpoint"):
        opt.load_state_dict(state)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        assert all(torch.equal(entry[k], after["state"][key][k]) for k in entry)
    train(model, opt, 1)


def test_a_checkpoint_of_another_optimizer_is_refused() -> None:
    model = net()
    adamw = torch.optim.AdamW(trainable(model))
    train(model, adamw, 2)
    fresh = net()
    opt = optimizer(fresh, **UNEVEN)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="checkpoint"):
        opt.load_state_dict(adamw.state_dict())
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"] and after["state"].keys() == before["state"].keys()
    train(fresh, opt, 1)


def test_factors_of_another_structure_are_refused() -> None:
    model = net()
    opt = optimizer(model, factor_structure="dense")
    train(model, opt, 2)
    other = optimizer(model, factor_structure="lowrank")
    with pytest.raises(ValueError, match=r"checkpoint: .*factor_structure='lowrank'"):
        other.load_state_dict(opt.state_dict())
    assert not other.state_dict()["state"] or all(f["C"].abs().max() == 0 for f in factors_of(other).values())


def test_model_and_optimizer_copy_together() -> None:
    for copied in (lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy):
        model = net()
        opt = plain_bound(trainable(model), **UNEVEN)
        train(model, opt, 3)
        opt.close()  # removes the hooks, which belong to the original model
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            clone, other = copied((model, opt))
        assert [pair.name for pair in other.pairs] == ["up", "down"]
        assert all(p is q for p, q in zip(_parameters(other), trainable(clone), strict=True))
        assert equal_states(opt, other)
        reference, third = restored(model, opt, False, **UNEVEN)
        train(clone, other, 4, start=3)
        train(reference, third, 4, start=3)
        assert same(snapshot(clone), snapshot(reference))


def test_a_deep_copy_of_a_hooked_pair_trains_on_its_own() -> None:
    model = net()
    opt = plain_bound(trainable(model), **UNEVEN)
    train(model, opt, 3)
    before, factors = weights_of(opt), factors_of(opt)
    clone, other = copy.deepcopy((model, opt))
    train(clone, other, 3, start=3)
    for name, (a, b) in weights_of(opt).items():
        assert torch.equal(a, before[name][0]) and torch.equal(b, before[name][1])
        assert all(torch.equal(factors[name][k], factors_of(opt)[name][k]) for k in "CSHD")
    assert not torch.equal(factors_of(other)["up"]["C"], factors["up"]["C"])


def test_skipped_steps_survive_a_checkpoint() -> None:
    model = net()
    opt = optimizer(model, **UNEVEN)
    train(model, opt, 1)
    backward(model, batch(1))
    model.up.lora_A.weight.grad.fill_(float("nan"))
    with pytest.warns(UserWarning, match="skipped a step"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, other = restored(model, opt, True, **UNEVEN)
        assert other.metrics()["skipped_steps"] == opt.metrics()["skipped_steps"] == 1
