"""The budget: the test itself measures the KL from the base model and compares it with the bound."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support import Net, backward, batch, exact_kl, lora_layers, net, optimizer, same, snapshot, tiny_llama, train
from torch import Tensor

from ctr_optim.retention.budget import Budget
from ctr_optim.retention.meter import CannotMeasure

TEXT = [batch(100 + seed, n=8)[0] for seed in range(4)]


def base_of(model: Net) -> Net:
    base = copy.deepcopy(model)
    for layer in lora_layers(base).values():
        torch.nn.init.zeros_(layer.lora_B.weight)
    return base.requires_grad_(False)


@torch.no_grad()
def distance(model: Net, base: Net, ids: Tensor) -> float:
    return float(exact_kl(base(ids), model(ids)).mean())


@pytest.mark.parametrize("limit", [1e-3, 0.02, 0.3])
def test_the_budget_holds_on_retained_text(limit: float) -> None:
    model = net(b_std=0.0)
    base, ids = base_of(model), torch.cat(TEXT)
    opt = optimizer(model, lr=0.05, max_kl=0.05, calibration_interval=4, retain=TEXT, kl_budget=limit)
    used = []
    for step in range(40):
        train(model, opt, 1, step)
        used.append(distance(model, base, ids))
        found = opt.metrics()
        assert found["budget/limit"] == limit and found["retain/kl"] == found["budget/used"] <= 1.02 * limit
    assert max(used) <= 1.2 * limit  # between measurements it is only predicted
    assert max(used) > min(0.5 * limit, 0.04)  # training uses the budget


def test_without_text_the_budget_holds_on_the_batch() -> None:
    model = net(b_std=0.0)
    base = base_of(model)
    opt = optimizer(model, lr=0.05, max_kl=0.05, calibration_interval=4, kl_budget=0.05)
    for step in range(30):
        opt.zero_grad()
        ids, labels = batch(0)  # one fixed batch, so that the test and the optimizer measure the same KL
        backward(model, (ids, labels))
        opt.step()
        with torch.no_grad():
            kl = exact_kl(base(ids), model(ids))[labels != -100].mean()  # a batch this small is run again whole
        assert kl <= 1.25 * 0.05, step  # between measurements the KL is only predicted
    assert "retain/kl" not in opt.metrics() and opt.metrics()["budget/used"] <= 1.02 * 0.05


def test_a_budget_that_is_never_reached_changes_nothing() -> None:
    runs = []
    for options in ({}, {"kl_budget": 50.0}):
        model = net(b_std=0.0)
        opt = optimizer(model, lr=0.05, max_kl=1e-3, calibration_interval=4, retain=TEXT, **options)
        train(model, opt, 10)
        runs.append(snapshot(model))
    assert same(*runs)


def test_the_loss_still_falls_at_the_boundary() -> None:
    """With a full budget, the tangential component of the steps remains, so the loss continues to fall."""
    model = net(b_std=0.0)
    opt = optimizer(model, lr=0.05, max_kl=3e-4, calibration_interval=4, retain=TEXT, kl_budget=3e-3)
    losses, used, data = [], [], batch(0, n=16)
    for _ in range(150):
        opt.zero_grad()
        losses.append(float(backward(model, data)))
        opt.step()
        used.append(opt.metrics()["budget/used"])
    full = next(i for i, kl in enumerate(used) if kl > 0.9 * 3e-3)
    assert full < 75 and min(used[full + 1 :]) > 0.6 * 3e-3
    assert losses[0] - losses[-1] > 1.2 * (losses[0] - losses[full])


def test_measurements_come_more_often_as_the_budget_fills() -> None:
    class Straight:
        """A meter of a model whose distance from its base grows by the length of each step."""

        on_text, parameters = True, []

        def gradient(self, turn: int) -> None:
            return None

        def __init__(self) -> None:
            self.at, self.asked = 0.0, []  # type: float, list[float]

        def release(self) -> None:
            pass

        def measure(self) -> float:
            self.asked.append(self.at)
            return self.at**2

    meter = Straight()
    budget = Budget(1.0, meter, [])
    budget.begin()
    for _ in range(98):
        due = budget.due(0.01)
        meter.at += 0.01
        budget.moved(0.01, 1.0, torch.ones(()), due, {})
    gaps = [b - a for a, b in zip(meter.asked, meter.asked[1:], strict=False)]
    assert len(gaps) >= 4 and gaps == sorted(gaps, reverse=True) and gaps[-1] < gaps[0] / 4
    assert budget.left == pytest.approx(0.02, abs=1e-6)
    assert budget.factor(0.2) == 1.0 and budget.factor(2.0) == pytest.approx(0.15)


def test_a_run_goes_on_bit_for_bit() -> None:
    def make() -> tuple[Net, Any]:
        model = net(b_std=0.0)
        return model, optimizer(model, lr=0.05, max_kl=1e-2, calibration_interval=4, retain="self", kl_budget=0.02)

    model, opt = make()
    train(model, opt, 7)
    again, resumed = make()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    twin = copy.deepcopy((model, opt))
    for one, its in ((model, opt), (again, resumed), twin):
        train(one, its, 7, 7)
    assert same(snapshot(again), snapshot(model)) and same(snapshot(twin[0]), snapshot(model))
    assert resumed.metrics()["budget/used"] == opt.metrics()["budget/used"] is not None


def test_a_checkpoint_of_a_run_without_budget_can_go_on_with_one() -> None:
    model = net(b_std=0.0)
    opt = optimizer(model, lr=0.05, max_kl=1e-4)
    train(model, opt, 3)
    bounded = optimizer(model, lr=0.05, max_kl=1e-4, retain=None, kl_budget=5.0, calibration_interval=4)
    bounded.load_state_dict(opt.state_dict())
    train(model, bounded, 2, 3)
    assert bounded.metrics()["budget/used"] is not None


def test_text_that_is_padded_and_a_language_model() -> None:
    model = tiny_llama(torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    ids = torch.randint(3, 64, (40, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 14:] = 0
    opt = optimizer(
        model, lr=0.05, max_kl=0.05, calibration_interval=4, retain=[{"input_ids": ids, "attention_mask": mask}],
        kl_budget=0.01,
    )  # fmt: skip
    for step in range(8):
        ids_, labels = batch(step, 4, 8, 3, vocab=64)
        model(input_ids=ids_, labels=labels).loss.backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad():
        model.eval()
        here = model(input_ids=ids, attention_mask=mask).logits
        with model.disable_adapter():
            base = model(input_ids=ids, attention_mask=mask).logits
    assert 0.002 < float(exact_kl(base, here)[mask != 0].mean()) < 1.05 * 0.01


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"kl_budget": 0.0}, ValueError, "finite number > 0"),
        ({"kl_budget": math.inf}, ValueError, "finite number > 0"),
        ({"kl_budget": "1"}, TypeError, "finite number > 0"),
        ({"kl_budget": 1.0, "curvature": "none"}, ValueError, "curvature"),
        ({"kl_budget": 1.0, "calibration_interval": None}, ValueError, "cannot be measured"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"kl_budget.*{says}"):
        optimizer(net(), **{"calibration_interval": 4, **options})


def test_a_budget_that_is_exceeded_at_the_start() -> None:
    model = net(b_std=1.0)
    opt = optimizer(model, calibration_interval=4, retain=TEXT, kl_budget=1e-3)
    with pytest.raises(ValueError, match=r"nats per token from its base model.*fresh adapter"):
        train(model, opt, 1)


def test_other_parameters_that_train_are_refused() -> None:
    model = net()
    model.head.requires_grad_(True)
    with pytest.raises(ValueError, match="2 parameters train that belong to no LoRA layer"):
        optimizer(model, calibration_interval=4, retain=TEXT, kl_budget=1.0)


def test_a_model_without_logits_cannot_be_measured() -> None:
    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(b_std=0.0)

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            return {"value": self.inner(ids).square().mean()}

    model = Loss()
    opt = optimizer(model, calibration_interval=4, kl_budget=1.0, lr=0.01)
    model(TEXT[0])["value"].backward()
    with pytest.raises(CannotMeasure, match=r"cannot be measured.*no logits.*retain=batches"):
        opt.step()


def test_dora_is_refused() -> None:
    model = tiny_llama(use_dora=True)
    with pytest.raises(ValueError, match=r"belong to no LoRA layer.*no DoRA"):
        optimizer(model, calibration_interval=4, retain="self", kl_budget=1.0)
