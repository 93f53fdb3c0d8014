"""Copies, checkpoints and hooks pass the checks of torch's own optimizer test suite."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from foreign import INFO, build, every_configuration, regression, trained
from support import lora_layers, net, optimizer, same, snapshot, train
from torch import nn
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ctr_optim import CTROptimizer

# -- copies and checkpoints --------------------------------------------------------------------------------------------


@every_configuration
def test_a_loaded_state_goes_on_alike(kwargs: dict[str, Any]) -> None:
    params, loss, opt = trained(kwargs)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others, other_loss = regression()
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    fresh = build(
        others,
        {
            name: kwargs[name]
            for name in ("foreach", "curvature", "calibration_interval", "kl_schedule")
            if name in kwargs
        },
    )
    fresh.load_state_dict(torch.load(file, weights_only=True))
    keys = ("lr", "betas", "eps", "weight_decay", "maximize")
    assert all(fresh.param_groups[0][key] == opt.param_groups[0][key] for key in keys)
    for _ in range(4):
        loss(), other_loss()
        opt.step(), fresh.step()
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_state_dict_of_floats_for_steps_loads() -> None:
    """Old checkpoints and other tools store the step as a plain number."""
    params, loss, opt = trained({})
    state = copy.deepcopy(opt.state_dict())
    for entry in state["state"].values():
        entry["step"] = float(entry["step"])
    opt.load_state_dict(state)
    assert all(torch.is_tensor(opt.state[p]["step"]) and float(opt.state[p]["step"]) == 4 for p in params)
    loss(), opt.step()
    assert all(float(opt.state[p]["step"]) == 5 for p in params)


@pytest.mark.parametrize("saved, loading", itertools.product([False, True], repeat=2))
def test_names_of_parameters_may_come_and_go(saved: bool, loading: bool) -> None:
    def given(params: list[Parameter], named: bool) -> Any:
        return list(zip(("weight", "bias"), params, strict=True)) if named else params

    params, loss = regression()
    opt = CTROptimizer(given(params, saved))
    loss(), opt.step()
    others, _ = regression()
    fresh = CTROptimizer(given(others, loading))
    fresh.load_state_dict(opt.state_dict())
    has = "param_names" in fresh.param_groups[0]
    assert has == (saved or loading)
    assert not has or fresh.param_groups[0]["param_names"] == ["weight", "bias"]
    assert torch.equal(fresh.state[others[0]]["exp_avg"], opt.state[params[0]]["exp_avg"])


def test_a_state_dict_holds_only_what_can_be_loaded_safely() -> None:
    model = net()
    opt = optimizer(model, rank_scheduler={"interval": 4})
    train(model, opt, 3)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)


@every_configuration
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_alike(kwargs: dict[str, Any], way: str) -> None:
    params, loss, opt = trained(kwargs)
    loss()
    grads = [p.grad.clone() for p in params]
    both = copy.deepcopy((params, opt)) if way == "deepcopy" else pickle.loads(pickle.dumps((params, opt)))
    others, other = both
    for p, q, g in zip(params, others, grads, strict=True):
        p.grad, q.grad = g, g.clone()
    opt.step(), other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_copy_alone_can_be_pickled() -> None:
    _, _, opt = trained({})
    other = pickle.loads(pickle.dumps(copy.deepcopy(opt)))
    assert str(other.state_dict()) == str(opt.state_dict())


@pytest.fixture
def heard() -> Iterator[list[str]]:
    handles: list[Any] = []
    calls: list[str] = []
    handles.append(register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")))
    handles.append(register_optimizer_step_post_hook(lambda *_: calls.append("global post")))
    yield calls
    for handle in handles:
        handle.remove()


# -- hooks -------------------------------------------------------------------------------------------------------------


def test_step_hooks_run_in_torchs_order(heard: list[str]) -> None:
    _, loss, opt = trained({}, 0)
    opt.register_step_pre_hook(lambda *_: heard.append("pre"))
    post = opt.register_step_post_hook(lambda *_: heard.append("post"))
    opt.step(lambda: heard.append("closure") or loss())
    assert heard == ["global pre", "pre", "closure", "post", "global post"]
    post.remove()
    opt.step(loss)
    assert heard[5:] == ["global pre", "pre", "global post"]


def test_a_step_pre_hook_may_replace_the_arguments() -> None:
    _, loss, opt = trained({}, 0)
    calls: list[int] = []
    opt.register_step_pre_hook(
        lambda o, args, kwargs: (
            (
                o,
                lambda: calls.append(1) or loss(),
            ),
            {},
        )
    )
    assert opt.step() is not None and calls == [1]


def test_state_dict_hooks() -> None:
    _, _, opt = trained({})
    seen: list[str] = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda o, s: {**s, "mine": 1})
    opt.register_state_dict_post_hook(lambda o, s: seen.append("first"), prepend=True)
    saved = opt.state_dict()
    assert saved["mine"] == 1 and seen == ["pre", "first"]


def test_load_state_dict_hooks_see_and_change_what_is_loaded() -> None:
    _, _, opt = trained({})
    saved = copy.deepcopy(opt.state_dict())
    fresh = CTROptimizer(regression()[0])
    fresh.register_load_state_dict_pre_hook(lambda o, s: s["param_groups"][0].__setitem__("lr", 0.5))

    def forgetful(o: CTROptimizer, s: dict[str, Any]) -> dict[str, Any]:
        assert s["param_groups"][0]["lr"] == 0.5
        entries = {k: {**entry, "exp_avg": torch.zeros_like(entry["exp_avg"])} for k, entry in s["state"].items()}
        return {**s, "state": entries}

    fresh.register_load_state_dict_pre_hook(forgetful)
    after: list[float] = []
    fresh.register_load_state_dict_post_hook(lambda o: after.append(o.param_groups[0]["lr"]))
    fresh.load_state_dict(saved)
    assert after == [0.5]
    mine = [fresh.state[p] for p in fresh.param_groups[0]["params"]]
    assert all(not entry["exp_avg"].any() and entry["exp_avg_sq"].any() for entry in mine)


# -- errors, and references that remain --------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["supports_sparse", "supports_complex"])
def test_what_we_say_that_we_refuse_is_refused(flag: str) -> None:
    assert not getattr(INFO, flag)
    p = Parameter(torch.randn(4, 4, dtype=torch.complex64 if flag == "supports_complex" else torch.float32))
    p.grad = p.detach().clone() if flag == "supports_complex" else torch.eye(4).to_sparse()
    before = p.detach().clone()
    with pytest.raises(TypeError, match="gradient of shape"):
        CTROptimizer([p]).step()
    assert torch.equal(p, before)


def test_an_optimizer_that_is_gone_is_gone() -> None:
    model = net()
    opt = optimizer(model, calibration_interval=2, rank_scheduler={"interval": 4})
    train(model, opt, 3)
    ghost = weakref.ref(opt)
    del opt
    gc.collect()
    assert ghost() is None
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
    assert not any(getattr(m, kind) for m in model.modules() for kind in kinds)
    assert lora_layers(model) and same(snapshot(model), snapshot(model))


def test_lookahead_style_wrappers_find_an_optimizer_like_any_other() -> None:
    """Groups, state and defaults are torch's own, so wrappers that swap parameters can use them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = CTROptimizer(nn.Linear(2, 2).parameters(), lr=0.1)
    assert isinstance(opt, torch.optim.Optimizer)
    assert {"lr", "betas", "eps", "weight_decay", "maximize", "foreach"} <= opt.defaults.keys()
    assert all(opt.param_groups[0][key] == value for key, value in opt.defaults.items())
