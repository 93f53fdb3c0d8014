"""Discovery: the optimizer finds the LoRA layers that belong to its parameters."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from support import (
    LoRALinear,
    TorchtitanLinear,
    TorchtuneLinear,
    backward,
    batch,
    factors_of,
    lora_layers,
    loss_of,
    net,
    tiny_llama,
    train,
    trainable,
)
from torch import Tensor, nn

from ctr_optim import CTROptimizer, LoRAPair

QUIET: dict[str, Any] = dict(calibration_interval=None, factor_interval=1, factor_structure="dense")
PROJECTIONS = {
    *(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
}  # fmt: skip
ALL = {f"model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS}


def names(opt: CTROptimizer) -> set[str]:
    assert len({pair.name for pair in opt.pairs}) == len(opt.pairs)
    return {pair.name for pair in opt.pairs}


# -- libraries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, True])
def test_every_layer_of_a_peft_model(explicit: bool) -> None:
    model = tiny_llama(torch.float32)
    opt = CTROptimizer(trainable(model), model=model if explicit else None, **QUIET)
    assert names(opt) == ALL
    owners = {name: p for name, p in model.named_parameters()}
    for pair in opt.pairs:
        assert isinstance(pair, LoRAPair)
        assert pair.A is owners[f"base_model.model.{pair.name}.lora_A.default.weight"]
        assert pair.B is owners[f"base_model.model.{pair.name}.lora_B.default.weight"]
        assert (pair.rank, pair.scaling) == (4, 2.0)
        assert pair.max_rank == min(pair.A.shape[1], pair.B.shape[0])


def test_rslora_and_rank_patterns() -> None:
    model = tiny_llama(torch.float32, use_rslora=True, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "v_proj"])
    opt = CTROptimizer(trainable(model), **QUIET)
    for pair in opt.pairs:
        rank = 2 if "q_proj" in pair.name else 4
        assert pair.rank == rank and pair.scaling == pytest.approx(8 / rank**0.5)


def test_dora_keeps_its_magnitude_outside_the_pairs() -> None:
    model = tiny_llama(torch.float32, use_dora=True, target_modules=["q_proj"])
    opt = CTROptimizer(trainable(model), **QUIET)
    assert names(opt) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert sum(len(g["params"]) for g in opt.param_groups) == 6


def check_two_layers(model: nn.Sequential, x: torch.Tensor) -> CTROptimizer:
    """Check that layers of ranks 2 and 3 with alpha 8 are found, and that a step gives them factors."""
    opt = CTROptimizer(trainable(model), **QUIET)
    assert [(p.name, p.rank, p.scaling) for p in opt.pairs] == [("0", 2, 4.0), ("2", 3, pytest.approx(8 / 3))]
    assert opt.pairs[0].A is model[0].lora_a.weight and opt.pairs[1].B is model[2].lora_b.weight
    model(x).square().mean().backward()
    opt.step()
    assert all(f["C"].norm() > 0 and f["S"].norm() > 0 for f in factors_of(opt).values())
    return opt


def test_torchtune_style_layers() -> None:
    model = nn.Sequential(TorchtuneLinear(5, 6, 2, 8.0), nn.Tanh(), TorchtuneLinear(6, 4, 3, 8.0))
    check_two_layers(model, torch.randn(7, 5))


def test_torchtitan_style_layers_keep_their_scale_when_ranks_move() -> None:
    """torchtitan's LoRA layers have no attributes for rank and alpha, only ``_lora_scaling``."""
    model = nn.Sequential(TorchtitanLinear(12, 6, 2, 8.0), nn.Tanh(), TorchtitanLinear(6, 10, 3, 8.0))
    opt = check_two_layers(model, torch.randn(7, 12))
    pair = opt.pairs[0]
    with torch.no_grad():
        pair.A.set_(pair.A.repeat(2, 1))
        pair.B.set_(pair.B.repeat(1, 2))
    pair.library.rank_changed(pair, pair.scaling)
    assert pair.down.out_features == pair.up.in_features == pair.rank == 4 and pair.scaling == 4.0


def test_hand_written_layers() -> None:
    model = net(scaling=3.0)
    opt = CTROptimizer(trainable(model), **QUIET)
    assert [(p.name, p.rank, p.scaling) for p in opt.pairs] == [("up", 3, 3.0), ("down", 3, 1.5)]


def test_a_layer_without_scaling_has_one() -> None:
    model = net()
    del model.up.scaling
    assert CTROptimizer(trainable(model), model=model, **QUIET).pairs[0].scaling == 1.0


# -- some of the parameters -------------------------------------------------------------------------------------------


def test_two_adapters_and_the_one_that_trains() -> None:
    from peft import LoraConfig

    model = tiny_llama(torch.float32, target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    opt = CTROptimizer(trainable(model), **QUIET)
    assert names(opt) == {f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv"}
    assert {pair.adapter for pair in opt.pairs} == {"second"} and {pair.rank for pair in opt.pairs} == {2}
    both = [p for n, p in model.named_parameters() if "lora_" in n]
    opt = CTROptimizer(both, **QUIET)
    expected = {f"model.layers.{i}.self_attn.q_proj[{a}]" for i in range(2) for a in ("default", "second")}
    assert names(opt) == expected | {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}


def test_frozen_parameters_in_the_list_do_no_harm() -> None:
    model = net()
    opt = CTROptimizer(model.parameters(), lr=0.1, weight_decay=0.5, **QUIET)
    assert names(opt) == {"up", "down"}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, opt, 2)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == (not p.requires_grad), n
        assert bool(opt.state.get(p)) == p.requires_grad, n


def test_layers_of_which_no_parameter_is_given_are_left_alone() -> None:
    model = net()
    opt = CTROptimizer(model.up.parameters(), **QUIET)
    assert names(opt) == {"up"}
    assert not model.down.lora_B._forward_hooks


def test_halves_may_be_in_different_groups() -> None:
    model = net()
    halves = [[p for n, p in model.named_parameters() if key in n] for key in ("lora_A", "lora_B")]
    opt = CTROptimizer([{"params": halves[0], "lr": 1e-3}, {"params": halves[1], "lr": 1e-2}], max_kl=None, **QUIET)
    assert names(opt) == {"up", "down"}
    before = [[p.detach().clone() for p in half] for half in halves]
    train(model, opt, 1)
    rms = [
        max(float((p.detach() - q).abs().max()) for p, q in zip(half, old, strict=True))
        for half, old in zip(halves, before, strict=True)
    ]
    assert rms[1] > 3 * rms[0] > 0


def test_named_parameters_are_accepted() -> None:
    model = net()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert names(CTROptimizer(named, **QUIET)) == {"up", "down"}


def test_a_group_added_later_is_hooked() -> None:
    model = net()
    opt = CTROptimizer(trainable(model.up), **QUIET)
    train(model, opt, 2)
    factors = factors_of(opt)["up"]
    opt.add_param_group({"params": trainable(model.down), "lr": 0.5})
    assert names(opt) == {"up", "down"}
    assert torch.equal(factors_of(opt)["up"]["C"], factors["C"])
    train(model, opt, 1, start=2)
    assert factors_of(opt)["down"]["C"].norm() > 0
    assert len(model.up.lora_B._forward_hooks) == 1


def test_two_models_in_one_optimizer() -> None:
    one, two = net(0), net(1)
    opt = CTROptimizer([*trainable(one), *trainable(two)], lr=0.1, calibration_interval=1, factor_interval=1)
    assert len(opt.pairs) == 4
    loss = loss_of(one(batch()[0]) + two(batch()[0]), batch()[1])
    loss.backward()
    opt.step()
    assert opt.metrics()["trust/source"] == "assumed (no single model holds all the layers)"


def test_an_explicit_model_needs_no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(*_: Any) -> Any:
        raise AssertionError("the heap was scanned")

    model = net()
    monkeypatch.setattr(gc, "get_objects", scan)
    assert names(CTROptimizer(trainable(model), model=model, **QUIET)) == {"up", "down"}


def test_a_scan_survives_weak_proxies() -> None:
    gone = nn.Linear(2, 2)
    proxy = weakref.proxy(gone)
    del gone
    gc.collect()
    model = net()
    assert names(CTROptimizer(trainable(model), **QUIET)) == {"up", "down"}
    assert type(proxy) in weakref.ProxyTypes  # keeps the weak proxy alive during the search


# -- no pairs, odd pairs ----------------------------------------------------------------------------------------------


def test_without_lora_layers_and_a_bound_it_is_adamw() -> None:
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = CTROptimizer(mine.parameters(), lr=1e-2, weight_decay=0.1, max_kl=None)
        reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.999))
        for step in range(5):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            for model, opt in ((mine, ours), (theirs, reference)):
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()
        found = ours.metrics()
    assert not caught  # full fine-tuning is supported, so there is no warning
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert found["ranks"] == {} and found["kl_from_base"] == 0 and found["trust/scale"] == 1.0


def test_layers_found_bring_no_warning() -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = CTROptimizer(trainable(model))
        train(model, opt, 3)
        opt.metrics()


@pytest.mark.parametrize("structure", ["diagonal", "dense", "lowrank"])
def test_an_unused_layer_stays_and_disturbs_nothing(structure: str) -> None:
    model, reference = net(), net()
    model.spare = LoRALinear(8, 10, 3, 1.0).double()
    options = {**QUIET, "factor_structure": structure, "lr": 0.1, "max_kl": 1e-3, "weight_decay": 0.1}
    opt, plain = CTROptimizer(trainable(model), **options), CTROptimizer(trainable(reference), **options)
    before = [p.detach().clone() for p in model.spare.parameters()]
    train(model, opt, 4)
    train(reference, plain, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.spare.parameters(), before, strict=True))
    for name, layer in lora_layers(reference).items():
        for p, q in zip(layer.parameters(), model.get_submodule(name).parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_a_layer_used_twice_sees_the_tokens_of_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = LoRALinear(4, 4, 2, 1.0), LoRALinear(4, 3, 2, 1.0)
            nn.init.normal_(self.layer.lora_B.weight)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = [x, self.layer(x).tanh()]
            return self.out(self.layer(self.seen[1]))

    model, x = Twice().double(), torch.randn(9, 4, dtype=torch.float64)
    opt = CTROptimizer(trainable(model), **QUIET)
    nn.functional.cross_entropy(model(x), torch.arange(9) % 3).backward()
    inputs = torch.cat(model.seen).detach()
    opt.step()
    torch.testing.assert_close(factors_of(opt)["layer"]["C"], inputs.mT @ inputs / 18)


def test_the_same_layer_under_two_names_is_one_pair() -> None:
    model = net()
    model.alias = model.up
    opt = CTROptimizer(trainable(model), **QUIET)
    assert names(opt) == {"up", "down"}
    backward(model, batch())
    opt.step()
    assert opt.metrics()["ranks"] == {"up": 3, "down": 3}


def test_models_of_one_size_come_in_the_order_of_their_parameters() -> None:
    """Processes add up statistics layer by layer, so the order of layers must not depend on the heap."""
    models = [net(seed) for seed in range(4)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        opt = CTROptimizer([p for i in order for p in trainable(models[i])])
        layers = [next(i for i, m in enumerate(models) if pair.layer in set(m.modules())) for pair in opt.pairs]
        assert layers == [i for i in order for _ in range(2)]
        opt.close()
