"""Factors from the hooks equal their definitions."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from oracles import DENSE, llama_factors, oracle
from support import (
    Net,
    assert_factors,
    backward,
    batch,
    factors_of,
    llama_batch,
    loss_of,
    net,
    optimizer,
    snapshot,
    tiny_llama,
)
from torch import Tensor, nn

# -- against the definitions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_factors_are_what_the_definitions_say(dtype: torch.dtype, tol: float) -> None:
    model, data = net(dtype=dtype), batch()
    expected = oracle(net(), data)
    opt = optimizer(model, **DENSE)
    backward(model, data)
    opt.step()
    assert_factors(factors_of(opt), expected, tol)


def test_factors_of_a_transformer(llama_expected: dict[str, dict[str, Tensor]]) -> None:
    assert_factors(llama_factors(tiny_llama(), llama_batch()), llama_expected, 1e-10)


def test_structures_hold_the_diagonal_of_the_dense_factors() -> None:
    expected = oracle(net(), batch())
    for structure in ("diagonal", "lowrank"):
        model = net()
        opt = optimizer(model, **{**DENSE, "factor_structure": structure})
        backward(model, batch())
        opt.step()
        for name, found in factors_of(opt).items():
            for key in "CS":
                torch.testing.assert_close(found[key].diagonal(), expected[name][key].diagonal(), rtol=1e-5, atol=1e-12)
            for key in "HD":
                torch.testing.assert_close(found[key], expected[name][key])


def test_moving_average_is_bias_corrected() -> None:
    decay, model = 0.7, net()
    opt = optimizer(model, factor_decay=decay, **DENSE)
    weights, seen = [], []
    for step in range(4):
        opt.zero_grad()
        seen.append(oracle(model, batch(step)))
        weights.append(decay ** (3 - step))
        backward(model, batch(step))
        opt.step()
    expected = {
        name: {k: sum(w * s[name][k] for w, s in zip(weights, seen, strict=True)) / sum(weights) for k in "CSHD"}
        for name in seen[0]
    }
    assert_factors(factors_of(opt), expected, 1e-10)


def test_factors_update_when_due() -> None:
    model = net()
    opt = optimizer(model, factor_interval=3, **DENSE)
    changed = []
    for step in range(8):
        before = factors_of(opt)["up"]["C"]
        opt.zero_grad()
        backward(model, batch(step))
        opt.step()
        changed.append(not torch.equal(before, factors_of(opt)["up"]["C"]))
    assert changed == [True, True, True, True, False, False, True, False]  # steps 0, 1, 2, then every third step


def test_scaling_is_inside_the_output_factor() -> None:
    one, two = (oracle(net(scaling=s), batch()) for s in (1.0, 2.0))
    assert not torch.allclose(one["up"]["S"], two["up"]["S"])
    model = net(scaling=2.0)
    opt = optimizer(model, **DENSE)
    backward(model, batch())
    opt.step()
    assert_factors(factors_of(opt), two, 1e-10)


def test_a_fresh_adapter_has_an_output_factor_but_no_rank_output() -> None:
    model = net(b_std=0.0)
    opt = optimizer(model, **DENSE)
    backward(model, batch())
    opt.step()
    for found in factors_of(opt).values():
        assert found["D"].abs().max() == 0
        assert found["S"].norm() > 0 and found["H"].norm() > 0 and found["C"].norm() > 0


def test_a_limit_on_tokens_takes_one_in_every_k() -> None:
    ids, labels = batch(n=4, length=6, ignored=0)
    model = net()
    opt = optimizer(model, max_tokens=8, **DENSE)  # 24 tokens, so one of every three
    backward(model, (ids, labels))
    opt.step()
    golden = (5**0.5 - 1) / 2
    places = torch.tensor([3 * i + int(i * golden % 1 * 3) for i in range(8)])
    assert len(set((places % 6).tolist())) > 2  # a fixed place would sample two positions of each row
    kept = (ids.flatten()[places][None], labels.flatten()[places][None])  # tokens of this net are independent
    assert_factors(factors_of(opt), oracle(net(), kept), 1e-10)


def scaled_step(model: Net, opt: Any, scaler: Any, data: tuple[Tensor, Tensor], clip: bool) -> None:
    opt.zero_grad()
    scaler.scale(loss_of(model(data[0]), data[1])).backward()
    if clip:
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    scaler.step(opt)
    scaler.update()


# -- loss scaling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
def test_a_loss_scale_cancels(clip: bool) -> None:
    model, data = net(dtype=torch.float32), batch()
    opt, scaler = optimizer(model, **DENSE), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(model, opt, scaler, data, clip)
    assert_factors(factors_of(opt), oracle(net(), data), 1e-5)


@pytest.mark.parametrize("where", ["gradient", "backward"])
def test_an_overflowed_step_is_forgotten(where: str) -> None:
    model = net(dtype=torch.float32)
    opt, scaler = optimizer(model, **DENSE), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(model, opt, scaler, batch(0), False)
    before, weights = factors_of(opt), snapshot(model)

    opt.zero_grad()
    loss = scaler.scale(loss_of(model(batch(1)[0]), batch(1)[1]))
    if where == "backward":
        loss = loss * float("inf")
    loss.backward()
    if where == "gradient":  # the weight's gradient overflows; the gradient at the layer's output does not
        model.up.lora_A.weight.grad[0, 0] = float("inf")
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 512.0
    for key, value in snapshot(model).items():
        assert torch.equal(value, weights[key])
    assert_factors(factors_of(opt), before, 1e-30)

    reference = net(dtype=torch.float32)
    again = optimizer(reference, **DENSE)
    for step in (0, 2):
        again.zero_grad()
        backward(reference, batch(step))
        again.step()
    scaled_step(model, opt, scaler, batch(2), False)
    assert_factors(factors_of(opt), factors_of(again), 1e-5)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- lifetime of the hooks ---------------------------------------------------------------------------------------------


def test_close_removes_every_hook() -> None:
    model = net()
    opt = optimizer(model, calibration_interval=1)
    assert hooks(model) > 0
    opt.close()
    assert hooks(model) == 0
    backward(model, batch())
    opt.step()
    opt.close()


def test_hooks_go_with_the_optimizer() -> None:
    model = net()
    opt = optimizer(model, calibration_interval=1)
    backward(model, batch())
    opt.step()
    ref = weakref.ref(opt)
    del opt
    gc.collect()
    assert ref() is None
    assert hooks(model) == 0


def test_a_new_optimizer_does_not_hear_the_old_one() -> None:
    model, data = net(), batch()
    old = optimizer(model, **DENSE)
    new = optimizer(model, **DENSE)
    backward(model, data)
    new.step()
    old_factors, found = factors_of(old), factors_of(new)
    assert_factors(found, oracle(net(), data), 1e-10)
    assert all(f["C"].abs().max() == 0 for f in old_factors.values())


def test_loading_a_checkpoint_hooks_each_layer_once() -> None:
    model = net()
    opt = optimizer(model, calibration_interval=1, **DENSE)
    before = hooks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(opt.state_dict())
    assert hooks(model) == before
    backward(model, batch())
    opt.step()
    assert_factors(factors_of(opt), oracle(net(), batch()), 1e-10)
    opt.close()
    assert hooks(model) == 0
