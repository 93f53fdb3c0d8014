"""Texts for users: errors and warnings about misspelt, missing or useless arguments, and the optimizer's repr."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import backward, batch, net, optimizer, tiny_llama, train, trainable
from torch import nn

import ctr_optim
from ctr_optim import CTROptimizer, RankScheduler
from ctr_optim.cli import main


def silent(build: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return build()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: [{"params": m}]], ids=["model", "group"])
def test_a_model_in_place_of_parameters(wrap: Any) -> None:
    with pytest.raises(TypeError, match=r"params: got a Net.*pass model\.parameters\(\)"):
        CTROptimizer(wrap(net()))


def test_a_generator_that_is_used_up() -> None:
    parameters = net().parameters()
    list(parameters)
    with pytest.raises(ValueError, match=r"empty parameter list: the generator is used up"):
        CTROptimizer(parameters)
    with pytest.raises(ValueError, match=r"empty parameter list\. .*is_trainable=True"):
        CTROptimizer([])


def test_a_generator_that_is_not_used_up() -> None:
    model = net()
    assert len(CTROptimizer(p for p in model.parameters() if p.requires_grad).param_groups[0]["params"]) == 4


@pytest.mark.parametrize(
    "given, meant", [("max_lk", "max_kl"), ("weigth_decay", "weight_decay"), ("kl_scheduler", "kl_schedule")]
)
def test_a_misspelt_option_is_told_the_nearest(given: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"^CTROptimizer: unknown option '{given}'; did you mean '{meant}'\?"):
        CTROptimizer(trainable(net()), **{given: 1.0})


def test_an_option_like_no_other_gets_the_list() -> None:
    with pytest.raises(TypeError, match=r"unknown option 'qqqq'; expected one of average, basis_interval, betas"):
        CTROptimizer(trainable(net()), qqqq=1)


def test_a_misspelt_option_of_the_scheduler() -> None:
    with pytest.raises(TypeError, match=r"^RankScheduler: unknown option 'intervall'; did you mean 'interval'\?"):
        CTROptimizer(trainable(net()), rank_scheduler={"intervall": 3})


@pytest.mark.parametrize(
    "key, message", [("weigth_decay", "did you mean 'weight_decay'"), ("max_kl", "optimizer as a whole")]
)
def test_a_group_option_that_nobody_would_read(key: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        CTROptimizer([{"params": trainable(net()), key: 0.1}])


def test_keys_that_frameworks_put_into_groups_pass() -> None:
    keys = ["name", "initial_lr", "lr_scale", "weight_decay_mult", "max_momentum", "swa_lr", "layer"]
    assert CTROptimizer([{"params": trainable(net()), **dict.fromkeys(keys, 0.1)}]).param_groups[0]["name"] == 0.1


# -- warnings, once each ----------------------------------------------------------------------------------------------


def given(caught: Any, text: str) -> int:
    return sum(text in str(w.message) for w in caught)


def test_an_adaptive_bound_without_a_closure_warns_once() -> None:
    model = net()
    opt = optimizer(model, kl_schedule="adaptive")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, opt, 3)
    assert given(caught, "step() got no closure") == 1 and caught[0].filename.endswith("support.py")


def test_an_adaptive_bound_with_a_closure_does_not_warn() -> None:
    model = net()
    opt = optimizer(model, kl_schedule="adaptive")
    silent(lambda: opt.step(lambda: backward(model, batch())))


def test_an_interval_longer_than_the_run_warns() -> None:
    with pytest.warns(UserWarning, match="no rank event falls into a run of total_steps=90"):
        opt = optimizer(net(), rank_scheduler=RankScheduler(interval=100, total_steps=90))
    silent(lambda: setattr(opt, "rank_scheduler", RankScheduler(interval=50, total_steps=90)))
    with pytest.warns(UserWarning, match="no rank event"):
        opt.rank_scheduler = RankScheduler(interval=60, total_steps=90)  # the last event may be at step 54 (until=0.6)


def test_a_frozen_adapter_warns() -> None:
    model = tiny_llama()
    for name, p in model.named_parameters():
        p.requires_grad_("lora" not in name)
    with pytest.warns(UserWarning, match=r"\(adapters default\) are frozen.*is_trainable=True"):
        CTROptimizer(model.parameters())
    next(p for name, p in model.named_parameters() if "lora_B" in name).requires_grad_(True)
    silent(lambda: CTROptimizer(model.parameters()))


# -- weights of other ranks -------------------------------------------------------------------------------------------


def test_weights_of_moved_ranks_name_the_remedy() -> None:
    saved, model = net(rank=5).state_dict(), net()
    opt = optimizer(model)
    with pytest.raises(RuntimeError, match=r"up: .*rank 5.*rank 3.*match_ranks\(model, weights\).*CTRCallback"):
        model.load_state_dict(saved)
    opt.close()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(saved)


def test_weights_of_more_directions_than_a_masked_layer_has_name_the_remedy() -> None:
    model = net()
    opt = optimizer(model, rank_scheduler=RankScheduler(interval=4), resize="masked")
    with pytest.raises(RuntimeError, match=r"up: .*rank 5.*keeps its 3 directions.*larger r"):
        model.load_state_dict(net(rank=5).state_dict())
    opt.close()


def test_a_state_of_moved_ranks_names_the_remedy() -> None:
    model = net(rank=5)
    opt = optimizer(model)
    train(model, opt, 1)
    with pytest.raises(ValueError, match=r"^checkpoint: .*match_ranks.*CTRCallback"):
        optimizer(net()).load_state_dict(opt.state_dict())


# -- text -------------------------------------------------------------------------------------------------------------


def test_an_optimizer_prints_its_layers_its_ranks_and_its_bound() -> None:
    model = net()
    model.head.requires_grad_(True)
    text = repr(CTROptimizer(model.parameters(), max_kl=0.05, weight_decay=0.1))
    assert "2 LoRA layers of 105 parameters, 88 other parameters" in text
    assert "ranks: 3 to 3, mean 3.00, fixed" in text and "bound: 0.05 nats per token" in text
    assert "group 0: 9 tensors, lr: 0.08" in text and "weight_decay: 0.1" in text


def test_an_optimizer_prints_ranks_that_moved() -> None:
    model = net()
    ranks = RankScheduler(interval=2, budget=2.0, max_change=None)
    opt = optimizer(model, lr=torch.tensor(0.05), rank_scheduler=ranks)
    train(model, opt, 3)
    low, high = min(opt.ranks.values()), max(opt.ranks.values())
    assert re.search(rf"ranks: {low} to {high}, mean 2\.00, every 2 steps", repr(opt)) and "steps: 3" in repr(opt)
    assert "bound: none" in repr(optimizer(net(), max_kl=None))


def test_the_command_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and f"ctr_optim {ctr_optim.__version__}" in capsys.readouterr().out


def test_inspect_counts_layers_as_people_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(11)])
    get_peft_model(nn.ModuleDict({"blocks": blocks}), LoraConfig(r=2, target_modules=["q"])).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    listed = re.findall(r"blocks\.(\d+)\.q", capsys.readouterr().out)
    assert listed == [str(i) for i in range(11)]
