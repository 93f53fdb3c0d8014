"""Factors from the taps: equal to first principles, whatever the training loop looks like."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from support import (
    Net,
    assert_factors,
    backward,
    batch,
    dense_factors,
    factors_of,
    llama_batch,
    llama_layers,
    llama_loss,
    lora_layers,
    loss_of,
    net,
    optimizer,
    peft_weights,
    plain_weights,
    snapshot,
    tiny_llama,
    trainable,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ctr_optim import CTROptimizer

DENSE: dict[str, Any] = dict(factor_structure="dense", max_kl=None)


def oracle(model: Net, data: tuple[Tensor, Tensor]) -> dict[str, dict[str, Tensor]]:
    return dense_factors(model, lora_layers(model), plain_weights, lambda m: loss_of(m(data[0]), data[1]))


def llama_oracle(model: nn.Module, data: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return dense_factors(model, llama_layers(model), peft_weights, lambda m: llama_loss(m, data))


def llama_factors(
    model: nn.Module, *batches: dict[str, Tensor], reduction: str = "mean"
) -> dict[str, dict[str, Tensor]]:
    """Factors after one step on these micro-batches."""
    opt = optimizer(model, loss_reduction=reduction, **DENSE)
    for data in batches:
        (llama_loss(model, data, reduction) / (len(batches) if reduction == "mean" else 1)).backward()
    opt.step()
    found = factors_of(opt)
    opt.close()
    return found


@pytest.fixture(scope="module")
def llama_expected() -> dict[str, dict[str, Tensor]]:
    return llama_oracle(tiny_llama(), llama_batch())


# -- against first principles -----------------------------------------------------------------------------------------


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
    assert changed == [True, True, True, True, False, False, True, False]  # 0, 1, 2 early; then every third


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
    opt = optimizer(model, max_tokens=8, **DENSE)  # 24 tokens: one in every three
    backward(model, (ids, labels))
    opt.step()
    golden = (5**0.5 - 1) / 2
    places = torch.tensor([3 * i + int(i * golden % 1 * 3) for i in range(8)])
    assert len(set((places % 6).tolist())) > 2  # a stride alone would see two positions of each row
    kept = (ids.flatten()[places][None], labels.flatten()[places][None])  # no token of this net sees another
    assert_factors(factors_of(opt), oracle(net(), kept), 1e-10)


# -- invariances ------------------------------------------------------------------------------------------------------


def split(data: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    chunks = {key: value.chunk(parts) for key, value in data.items()}
    return [{key: value[i] for key, value in chunks.items()} for i in range(parts)]


def pad(data: dict[str, Tensor], side: str, amount: int = 3) -> dict[str, Tensor]:
    around = (amount, 0) if side == "left" else (0, amount)
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0, "position_ids": 0}
    return {key: F.pad(value, around, value=fills[key]) for key, value in data.items()}


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_and_reduction_change_nothing(
    parts: int, reduction: str, llama_expected: dict[str, dict[str, Tensor]]
) -> None:
    found = llama_factors(tiny_llama(), *split(llama_batch(), parts), reduction=reduction)
    assert_factors(found, llama_expected, 1e-6)  # the model's norms compute in float32


def test_micro_batches_of_unequal_tokens_under_a_sum_loss() -> None:
    first, second = batch(0, n=3, ignored=1), batch(1, n=1, ignored=4)
    whole = (torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    model = net()
    opt = optimizer(model, loss_reduction="sum", **DENSE)
    backward(model, first, "sum")
    backward(model, second, "sum")
    opt.step()
    assert_factors(factors_of(opt), oracle(net(), whole), 1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str, llama_expected: dict[str, dict[str, Tensor]]) -> None:
    # float32: in float64 the model's own attention mask overflows to NaN on rows of nothing but padding
    assert_factors(llama_factors(tiny_llama(torch.float32), pad(llama_batch(), side)), llama_expected, 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, llama_expected: dict[str, dict[str, Tensor]]) -> None:
    model = tiny_llama()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_factors(llama_factors(model, llama_batch()), llama_expected, 1e-10)
    assert len(calls) == 2  # it did recompute


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_lora_layer_alone(reentrant: bool) -> None:
    model, (ids, labels) = net(), batch()
    opt = optimizer(model, **DENSE)
    x = model.embed(ids).requires_grad_()
    x = checkpoint(model.up, x, use_reentrant=reentrant).tanh()
    x = checkpoint(model.down, x, use_reentrant=reentrant)
    loss_of(model.head(x.tanh()), labels).backward()
    opt.step()
    assert_factors(factors_of(opt), oracle(net(), (ids, labels)), 1e-10)


def test_autocast_stays_close(llama_expected: dict[str, dict[str, Tensor]]) -> None:
    model = tiny_llama(torch.float32)
    opt = optimizer(model, **DENSE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = llama_loss(model, llama_batch())
    loss.backward()
    opt.step()
    found = factors_of(opt)
    assert all(t.dtype == torch.float32 for f in found.values() for t in f.values())
    assert_factors(found, llama_expected, 0.05)


def test_a_bfloat16_model_stays_close() -> None:
    model = net(dtype=torch.bfloat16)
    opt = optimizer(model, **DENSE)
    backward(model, batch())
    opt.step()
    found = factors_of(opt)
    assert all(t.dtype == torch.float32 for f in found.values() for t in f.values())
    assert_factors(found, oracle(net(), batch()), 0.05)


def test_retained_graphs_add_up() -> None:
    model, (ids, labels) = net(), batch()
    opt = optimizer(model, **DENSE)
    loss = loss_of(model(ids), labels) / 2
    loss.backward(retain_graph=True)
    loss.backward()
    opt.step()
    assert_factors(factors_of(opt), oracle(net(), (ids, labels)), 1e-10)


def test_forwards_without_a_backward_leave_no_trace() -> None:
    model, data, other = net(), batch(), batch(9)[0]
    opt = optimizer(model, **DENSE)
    with torch.no_grad():
        model(other)
    model.eval()
    model(other)
    model.train()
    loss = loss_of(model(data[0]), data[1])
    with torch.no_grad():
        model(other)
    model.eval()
    model(other)
    with torch.inference_mode():
        model(other)
    model.train()
    loss.backward()
    opt.step()
    assert_factors(factors_of(opt), oracle(net(), data), 1e-10)


def test_a_copied_model_leaves_no_trace() -> None:
    model, data = net(), batch()
    opt = optimizer(model, **DENSE)
    loss = loss_of(model(data[0]), data[1])
    clone = copy.deepcopy(model)
    backward(clone, batch(5))
    loss.backward()
    backward(clone, batch(6))
    opt.step()
    assert_factors(factors_of(opt), oracle(net(), data), 1e-10)


def test_the_order_of_layers_changes_nothing() -> None:
    expected = oracle(net(), batch())
    for reverse in (False, True):
        model = net()
        parameters = trainable(model)[::-1] if reverse else trainable(model)
        opt = CTROptimizer(parameters, model=model, calibration_interval=None, **DENSE)
        backward(model, batch())
        opt.step()
        assert_factors(factors_of(opt), expected, 1e-10)


def test_the_taps_change_neither_outputs_nor_gradients() -> None:
    plain, tapped, data = net(), net(), batch()
    opt = optimizer(tapped, **DENSE)
    backward(plain, data)
    backward(tapped, data)
    for p, q in zip(plain.parameters(), tapped.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
    assert torch.equal(plain(data[0]), tapped(data[0]))
    opt.close()


def test_layers_without_a_gradient_keep_their_factors() -> None:
    model = net()
    opt = optimizer(model, **DENSE)
    backward(model, batch())
    opt.step()
    before = factors_of(opt)
    opt.zero_grad()
    ids, labels = batch(1)
    with torch.no_grad():
        hidden = model.up(model.embed(ids)).tanh()
    loss_of(model.head(model.down(hidden).tanh()), labels).backward()
    opt.step()
    after = factors_of(opt)
    for key in "CSHD":
        assert torch.equal(before["up"][key], after["up"][key])
        assert not torch.equal(before["down"][key], after["down"][key])


# -- loss scaling -----------------------------------------------------------------------------------------------------


def scaled_step(model: Net, opt: Any, scaler: Any, data: tuple[Tensor, Tensor], clip: bool) -> None:
    opt.zero_grad()
    scaler.scale(loss_of(model(data[0]), data[1])).backward()
    if clip:
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    scaler.step(opt)
    scaler.update()


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
    if where == "gradient":  # the half-precision weight gradient overflows, the layer's own does not
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


# -- hooks live no longer than the optimizer --------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


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
