"""Loading of checkpoints: memory use, the restored bound, and ranks of several adapters."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import backward, batch, loss_of, net, optimizer, same, snapshot, tiny_llama, train
from torch import Tensor, nn

from ctr_optim import CTROptimizer, match_ranks

OPTIONS: dict[str, Any] = dict(lr=0.05, max_kl=1e-3, factor_interval=3, basis_interval=4, calibration_interval=5)


# -- memory -----------------------------------------------------------------------------------------------------------


def add_huge_frozen_weight(model: nn.Module) -> None:
    """Add a frozen weight with 2^48 entries that share one number's memory; no copy of it can be allocated."""
    model.register_parameter("huge", nn.Parameter(torch.zeros(1).expand(1 << 24, 1 << 24), requires_grad=False))


class WithLoss(nn.Module):
    """A model that returns its loss, whose Hessian ``curvature="hutchinson"`` measures."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = net(seed)

    def forward(self, ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.net(ids)
        return SimpleNamespace(logits=logits, loss=loss_of(logits, labels))


def train_on_own_loss(model: nn.Module, opt: CTROptimizer, steps: int, start: int = 0) -> None:
    """Train with the loss that the model returns."""
    for step in range(start, start + steps):
        opt.zero_grad()
        model(*batch(step)).loss.backward()
        opt.step()


@pytest.mark.parametrize("curvature", ["kfac", "gradient", "hutchinson", "none"])
def test_loading_allocates_nothing_for_frozen_weights(curvature: str) -> None:
    model, fresh = WithLoss(), WithLoss(seed=3)
    add_huge_frozen_weight(model)
    add_huge_frozen_weight(fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {**OPTIONS, "curvature": curvature, "calibration_interval": None}
        opt, other = (CTROptimizer(m.parameters(), model=m, **options) for m in (model, fresh))
    train_on_own_loss(model, opt, 3)
    with torch.no_grad():
        for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
            if p.numel() < 1000:
                q.copy_(p)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.state_dict()["state"].keys() == opt.state_dict()["state"].keys()
    if curvature == "hutchinson":
        assert all(entry["hessian_diagonal"].any() for entry in opt.state.values())
    train_on_own_loss(model, opt, 3, 3)
    train_on_own_loss(fresh, other, 3, 3)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True) if p.requires_grad
    )


# -- the bound --------------------------------------------------------------------------------------------------------


def adapted(max_kl: float | None, steps: int = 4) -> tuple[nn.Module, CTROptimizer]:
    model = net()
    opt = optimizer(model, lr=0.05, max_kl=max_kl, kl_schedule="adaptive")
    for step in range(steps):

        def closure(step: int = step) -> torch.Tensor:
            opt.zero_grad()
            return backward(model, batch(step))

        opt.step(closure)
    return model, opt


def live_bound(opt: CTROptimizer) -> Any:
    return opt.state_dict()["param_groups"][0]["ctr"]["max_kl"]


def test_a_bound_given_as_an_integer_adapts_and_loads() -> None:
    _, opt = adapted(1)
    saved = opt.state_dict()
    assert isinstance(live_bound(opt), float) and live_bound(opt) != 1
    other = optimizer(net(), lr=0.05, max_kl=1, kl_schedule="adaptive")
    other.load_state_dict(saved)
    assert live_bound(other) == live_bound(opt)


@pytest.mark.parametrize("schedule", ["lr", "constant"])
@pytest.mark.parametrize("own, saved", [(1e-3, 5e-3), (None, 5e-3), (1e-3, None)])
def test_the_constructors_bound_holds(schedule: str, own: float | None, saved: float | None) -> None:
    model = net()
    opt = optimizer(model, lr=0.05, max_kl=saved, kl_schedule=schedule)
    train(model, opt, 2)
    other = optimizer(model, lr=0.05, max_kl=own, kl_schedule=schedule)
    with pytest.warns(UserWarning, match=rf"checkpoint: max_kl={saved!r}.*max_kl={own!r}"):
        other.load_state_dict(opt.state_dict())
    train(model, other, 1, 2)
    assert other.metrics()["trust/max_kl"] == own


def test_the_same_bound_loads_without_a_warning() -> None:
    model = net()
    opt = optimizer(model, max_kl=1)
    train(model, opt, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer(model, max_kl=1.0).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("own, saved, expected", [(1e-3, None, 1e-3), (None, 1e-3, None), (1e-3, 5e-3, "live")])
def test_an_adaptive_bound_goes_on_where_it_was(own: Any, saved: Any, expected: Any) -> None:
    model, opt = adapted(saved)
    other = optimizer(model, lr=0.05, max_kl=own, kl_schedule="adaptive")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(opt.state_dict())
    assert live_bound(other) == (live_bound(opt) if expected == "live" else expected)

    def closure() -> torch.Tensor:
        other.zero_grad()
        return backward(model, batch(9))

    other.step(closure)


# -- ranks of several adapters ----------------------------------------------------------------------------------------


def two_adapters(first: int, second: int, seed: int = 0) -> nn.Module:
    from peft import LoraConfig

    model = tiny_llama(seed=seed, r=first)
    config = LoraConfig(r=second, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model.add_adapter("second", config, autocast_adapter_dtype=False)
    return model


def ranks_of(model: nn.Module, adapter: str) -> set[int]:
    return {m.lora_A[adapter].weight.shape[0] for m in model.modules() if hasattr(m, "lora_A")}


def test_match_ranks_keeps_adapters_apart() -> None:
    saved, model = two_adapters(5, 2), two_adapters(4, 3, seed=1)
    changed = match_ranks(model, saved.state_dict())
    assert ranks_of(model, "default") == {5} and ranks_of(model, "second") == {2}
    assert set(changed.values()) == {5, 2}
    model.load_state_dict(saved.state_dict())
    assert same(snapshot(model), snapshot(saved))


def test_match_ranks_takes_files_for_the_active_adapter_or_the_one_named(tmp_path: Path) -> None:
    two_adapters(5, 2).save_pretrained(tmp_path)
    model = two_adapters(4, 3, seed=1)
    match_ranks(model, tmp_path)
    assert ranks_of(model, "default") == {5} and ranks_of(model, "second") == {3}
    match_ranks(model, tmp_path / "second", adapter="second")
    assert ranks_of(model, "default") == {5} and ranks_of(model, "second") == {2}


def test_match_ranks_does_not_guess_among_active_adapters(tmp_path: Path) -> None:
    two_adapters(5, 2).save_pretrained(tmp_path)
    model = two_adapters(4, 3, seed=1)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"match_ranks: .*adapter=name"):
        match_ranks(model, tmp_path)
    assert ranks_of(model, "default") == {4}


def test_match_ranks_takes_the_only_adapter_under_another_name() -> None:
    weights = {k.replace(".default.", ".other."): v for k, v in tiny_llama(r=5).state_dict().items()}
    model = tiny_llama(r=4)
    match_ranks(model, weights)
    assert ranks_of(model, "default") == {5}


@pytest.mark.parametrize("curvature", ["kfac", "gradient"])
def test_parameters_of_no_lora_layer_come_back(curvature: str) -> None:
    def built(seed: int) -> tuple[nn.Module, CTROptimizer]:
        model = net(seed)
        model.head.requires_grad_(True)
        return model, optimizer(model, curvature=curvature, **OPTIONS)

    model, opt = built(0)
    train(model, opt, 3)
    other, again = built(1)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((model, opt), (other, again)):
        train(m, o, 3, 3)
    assert same(snapshot(model), snapshot(other))
