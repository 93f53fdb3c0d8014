"""QLoRA: LoRA on base models that bitsandbytes quantised to 4 or 8 bits, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    assert_factors,
    dense_factors,
    factors_of,
    llama_batch,
    llama_layers,
    llama_loss,
    peft_weights,
    tiny_llama,
    trainable,
)
from torch import nn

from ctr_optim import CTROptimizer, RankScheduler

peft = pytest.importorskip("peft", reason="the adapter is PEFT's")
bnb = pytest.importorskip("bitsandbytes", reason="it quantises the base")

STEPS = 4


def quantised(bits: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the tiny Llama without adapter, with linear layers of ``bits`` bits and always the same weights."""
    model = tiny_llama(dtype=dtype, peft=False)
    for name, module in list(model.model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        sizes = (module.in_features, module.out_features)
        if bits == 4:
            small = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4")
            small.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
        else:
            small = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            small.weight = bnb.nn.Int8Params(module.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        parent, _, child = name.rpartition(".")
        setattr(model.model.get_submodule(parent), child, small.to("cpu"))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    return model


def adapted(bits: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(quantised(bits, dtype), config, autocast_adapter_dtype=False)
    kind = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert {type(layer).__name__ for layer in llama_layers(model).values()} == {kind}
    assert all(layer.base_layer.weight.dtype in (torch.uint8, torch.int8) for layer in llama_layers(model).values())
    for layer in llama_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model.train()


@pytest.fixture(scope="module", params=[4, 8])
def bits(request: pytest.FixtureRequest) -> int:
    """Return the number of bits; skip the test if bitsandbytes has no kernel for this machine."""
    try:
        llama_loss(adapted(request.param), llama_batch()).backward()
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes {bnb.__version__} cannot train on {request.param} bits here: {error}")
    return int(request.param)


def optimizer(model: nn.Module, **options: Any) -> CTROptimizer:
    every = dict(factor_interval=1, basis_interval=1, calibration_interval=2, factor_structure="dense")
    return CTROptimizer(trainable(model), **{**every, **options}, model=model)


def test_factors_are_those_of_the_quantised_model(bits: int) -> None:
    model = adapted(bits)
    data = llama_batch()
    expected = dense_factors(model, llama_layers(model), peft_weights, lambda clone: llama_loss(clone, data))
    opt = optimizer(model, calibration_interval=None)
    llama_loss(model, data).backward()
    opt.step()
    assert_factors(factors_of(opt), expected, 1e-4)


def test_training_with_a_rank_event(bits: int, tmp_path: Path) -> None:
    model = adapted(bits)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    opt = optimizer(model, rank_scheduler=RankScheduler(interval=2, total_steps=STEPS, until=1.0, hysteresis=0.0))
    events: list[Any] = []
    opt.on_rank_event(events.append)
    for step in range(STEPS):
        llama_loss(model, llama_batch(step)).backward()
        opt.step()
        opt.zero_grad()
    assert {e.step for e in events} and len({pair.rank for pair in opt.pairs}) > 1
    metrics = opt.metrics()
    assert metrics["trust/source"] == "measured" and metrics["skipped_steps"] == 0 and metrics["kl_from_base"] > 0
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)

    model.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(quantised(bits), str(tmp_path))
    data = {k: v for k, v in llama_batch(9).items() if k != "labels"}
    with (
        torch.no_grad()
    ):  # training mode, because eval mode repacks weights on some CPUs, which fails for narrow layers
        assert torch.equal(again.train()(**data).logits, model.train()(**data).logits)


def test_half_precision_and_checkpointed_activations(bits: int) -> None:
    """The usual QLoRA set-up: a prepared base model, checkpointed activations, and compute in bfloat16."""
    base = peft.prepare_model_for_kbit_training(quantised(bits, torch.bfloat16), use_gradient_checkpointing=True)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear")).train()
    opt = optimizer(model)
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            llama_loss(model, llama_batch(step)).backward()
        opt.step()
        opt.zero_grad()
    metrics = opt.metrics()
    assert metrics["trust/source"] == "measured" and metrics["skipped_steps"] == 0 and metrics["kl_from_base"] > 0
