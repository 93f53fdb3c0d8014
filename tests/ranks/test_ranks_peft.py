"""Adapters that are saved after ranks have moved load in PEFT with the same outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TorchtuneLinear, llama_batch, llama_loss, net, relative_error, tiny_llama, train, trainable
from torch import Tensor, nn

from ctr_optim import CTROptimizer, export_compact, export_uniform
from ctr_optim.model.registry import find_pairs

peft = pytest.importorskip("peft", reason="the adapters are PEFT's")

RANKS: dict[str, Any] = dict(interval=2, window=1, sketch_rank=3, hysteresis=0.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, ".*mlp.*": 6, ".*_proj": 3}, "alpha_pattern": {"layers.0.*": 5}},
    "embedding": {
        "target_modules": ["embed_tokens", "q_proj", "v_proj"],
        "rank_pattern": {"embed_tokens": 3, "v_proj": 6},
        "alpha_pattern": {"embed_tokens": 1},
    },
}


def moved(variant: str) -> tuple[nn.Module, CTROptimizer]:
    """Return a model whose ranks have moved twice, and its optimizer."""
    model = tiny_llama(torch.float32, **VARIANTS[variant])
    opt = CTROptimizer(trainable(model), lr=0.01, factor_interval=1, rank_scheduler=RANKS)
    before = opt.metrics()["ranks"]
    scalings = {pair.name: pair.scaling for pair in opt.pairs}
    for step in range(5):
        opt.zero_grad()
        llama_loss(model, llama_batch(step)).backward()
        opt.step()
    assert opt.metrics()["ranks"] != before
    assert {pair.name: pair.scaling for pair in opt.pairs} == scalings  # the scaling does not depend on the rank
    return model, opt


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=llama_batch(99)["input_ids"]).logits


def reloaded(directory: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(tiny_llama(torch.float32, peft=False), str(directory))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized")
def test_what_is_saved_loads_as_the_same_function(variant: str, tmp_path: Path) -> None:
    model, opt = moved(variant)
    model.save_pretrained(tmp_path)
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    for pair in opt.pairs:  # the patterns list only layers that differ from the config
        assert (f"^{re.escape(pair.name)}" in config.rank_pattern) == (pair.rank != config.r)
    fresh = reloaded(tmp_path)
    ranks = {pair.name: pair.rank for pair in find_pairs(fresh)}
    assert ranks == opt.metrics()["ranks"]
    for pair, other in zip(opt.pairs, find_pairs(fresh), strict=True):
        assert other.scaling == pytest.approx(pair.scaling, rel=1e-12)
        assert other.layer.r == pair.layer.r == {"default": pair.rank}
    assert relative_error(outputs(fresh), outputs(model)) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized")
def test_an_export_with_one_rank_is_the_same_function(variant: str, tmp_path: Path) -> None:
    model, opt = moved(variant)
    rank = export_uniform(model, tmp_path)
    assert rank == max(opt.metrics()["ranks"].values())
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.rank_pattern, config.alpha_pattern, config.use_rslora) == (rank, {}, {}, False)
    fresh = reloaded(tmp_path)
    assert {pair.rank for pair in find_pairs(fresh)} == {rank}
    assert len({pair.scaling for pair in find_pairs(fresh)}) == 1
    assert relative_error(outputs(fresh), outputs(model)) < 1e-5
    assert model.peft_config["default"].rank_pattern  # the model's own config does not change


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("resize", ["masked", "physical"])
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized")
def test_a_compact_export_leaves_out_what_is_not_in_use(variant: str, resize: str, tmp_path: Path) -> None:
    model = tiny_llama(torch.float32, **VARIANTS[variant])
    ranks = dict(RANKS, min_rank=0, budget=0.6, max_change=None)
    opt = CTROptimizer(trainable(model), lr=0.01, factor_interval=1, rank_scheduler=ranks, resize=resize)
    shapes = {pair.name: pair.rank for pair in opt.pairs}
    for step in range(3):
        opt.zero_grad()
        llama_loss(model, llama_batch(step)).backward()
        opt.step()
    in_use = opt.metrics()["ranks"]
    assert 0 in in_use.values() and max(in_use.values()) > 0
    room = shapes if resize == "masked" else {name: max(1, rank) for name, rank in in_use.items()}
    assert {pair.name: pair.rank for pair in opt.pairs} == room
    before = {name: p.clone() for name, p in model.named_parameters()}
    written = export_compact(model, tmp_path / "compact")
    assert {name: rank for name, rank in written.items() if name in in_use} == {
        name: rank or int(variant == "dora") for name, rank in in_use.items()
    }
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    fresh = reloaded(tmp_path / "compact")
    assert {p.name: p.rank for p in find_pairs(fresh)} == {n: r for n, r in written.items() if r and n in in_use}
    assert relative_error(outputs(fresh), outputs(model)) < 1e-6
    if variant == "patterns" and resize == "masked":
        return  # PEFT itself cannot reload overlapping patterns of the user
    model.save_pretrained(tmp_path / "plain")  # PEFT's own save gives the same outputs, in a larger file
    assert relative_error(outputs(reloaded(tmp_path / "plain")), outputs(model)) < 1e-6


def test_a_compact_export_adds_to_what_was_excluded(tmp_path: Path) -> None:
    for before in (["lm_head", "k_proj"], r"lm_head|.*k_proj"):
        model = tiny_llama(torch.float32, exclude_modules=before)
        with torch.no_grad():
            for pair in find_pairs(model):
                if "v_proj" in pair.name:
                    pair.A.zero_(), pair.B.zero_()
        written = export_compact(model, tmp_path)
        assert [name for name, rank in written.items() if not rank] == [
            f"model.layers.{i}.self_attn.v_proj" for i in range(2)
        ]
        fresh = reloaded(tmp_path)
        assert {pair.name for pair in find_pairs(fresh)} == {name for name, rank in written.items() if rank}
        assert relative_error(outputs(fresh), outputs(model)) < 1e-6


def test_an_adapter_of_zeros_is_not_exported(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32)
    for pair in find_pairs(model):
        torch.nn.init.zeros_(pair.A), torch.nn.init.zeros_(pair.B)
    with pytest.raises(ValueError, match="nothing to save"):
        export_compact(model, tmp_path)


def test_exporting_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a PeftModel"):
        export_uniform(net(), tmp_path)
    with pytest.raises(TypeError, match="'other'"):
        export_uniform(tiny_llama(), tmp_path, adapter="other")
    with pytest.raises(TypeError, match="export_compact: got Net"):
        export_compact(net(), tmp_path)


def test_another_adapter_on_the_same_layers_is_left_alone(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={"q_proj": 5}))
    opt = CTROptimizer(trainable(model), lr=0.01, factor_interval=1, rank_scheduler=RANKS)
    assert {pair.adapter for pair in opt.pairs} == {"default"}
    for step in range(4):
        opt.zero_grad()
        llama_loss(model, llama_batch(step)).backward()
        opt.step()
    assert model.peft_config["other"].rank_pattern == {"q_proj": 5}
    model.save_pretrained(tmp_path)
    assert relative_error(outputs(reloaded(tmp_path)), outputs(model)) < 1e-6


# -- layers of other libraries ----------------------------------------------------------------------------------------


class _Torchtune(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8).requires_grad_(False)
        self.layer = TorchtuneLinear(8, 11, rank=4, alpha=6.0)
        self.other = TorchtuneLinear(11, 11, rank=4, alpha=3.0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.other(self.layer(self.embed(ids)).tanh())


def test_torchtune_layers_keep_their_scaling() -> None:
    model = _Torchtune().double()
    for layer in (model.layer, model.other):
        nn.init.normal_(layer.lora_b.weight, std=0.3)
    opt = CTROptimizer(trainable(model), lr=0.01, factor_interval=1, rank_scheduler={**RANKS, "budget": 3})
    train(model, opt, 4)
    ranks = opt.metrics()["ranks"]
    assert set(ranks.values()) != {4}
    for layer, name, scaling in ((model.layer, "layer", 1.5), (model.other, "other", 0.75)):
        assert layer.rank == ranks[name] == layer.lora_a.out_features == layer.lora_b.in_features
        assert layer.alpha / layer.rank == pytest.approx(scaling)


def test_plain_layers_keep_their_bookkeeping() -> None:
    model = net(rank=4)
    model.up.r, model.down.rank = 4, 4
    del model.down.scaling
    type(model.down).scaling = 1.0  # a class attribute
    try:
        opt = CTROptimizer(trainable(model), lr=0.01, factor_interval=1, rank_scheduler={**RANKS, "budget": 3})
        train(model, opt, 4)
    finally:
        del type(model.down).scaling
    ranks = opt.metrics()["ranks"]
    assert ranks != {"up": 4, "down": 4}
    assert (model.up.r, model.down.rank, model.up.scaling) == (ranks["up"], ranks["down"], 2.0)
    assert "scaling" not in vars(model.down)
