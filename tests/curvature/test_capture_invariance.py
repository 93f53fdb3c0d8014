"""Factors from the hooks do not depend on the form of the training loop."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import DENSE, llama_factors, oracle
from support import (
    assert_factors,
    backward,
    batch,
    factors_of,
    llama_batch,
    llama_loss,
    loss_of,
    net,
    optimizer,
    tiny_llama,
    trainable,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ctr_optim import CTROptimizer


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
    assert_factors(found, llama_expected, 1e-6)  # the tolerance allows for the model's norms, which use float32


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
    # In float64, the model's attention mask would overflow to NaN on rows that contain padding only.
    assert_factors(llama_factors(tiny_llama(torch.float32), pad(llama_batch(), side)), llama_expected, 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, llama_expected: dict[str, dict[str, Tensor]]) -> None:
    model = tiny_llama()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_factors(llama_factors(model, llama_batch()), llama_expected, 1e-10)
    assert len(calls) == 2  # the layer was recomputed


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
