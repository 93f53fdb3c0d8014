"""Training in the coordinates of retained text, compared with a reference that has P in the model's forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import (
    Net,
    backward,
    batch,
    factors_of,
    kl_of_step,
    lora_layers,
    net,
    optimizer,
    same,
    snapshot,
    train,
    trainable,
    weights_of,
)
from torch import Tensor, nn

from ctr_optim import RankScheduler, Retention, initialize
from ctr_optim.runtime.devices import exact

TEXT = [batch(100 + seed, n=8)[0] for seed in range(4)]


def retention(model: nn.Module, rank: int = 4) -> Retention:
    return Retention.measure(model, TEXT, rank=rank)


def whiteners(found: Retention) -> dict[str, Tensor]:
    return {name: P.to_dense() for name in found.layers if (P := found.metric_for(name)) is not None}


class WithP(nn.Module):
    """A LoRA layer that multiplies its input by P, so that its A is the A' of the coordinates."""

    def __init__(self, layer: Any, P: Tensor) -> None:
        super().__init__()
        self.base, self.lora_A, self.lora_B, self.scaling = layer.base, layer.lora_A, layer.lora_B, layer.scaling
        self.register_buffer("P", P)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.lora_B(self.lora_A(x @ self.P))


def reference(model: Net, found: Retention) -> Net:
    twin, P = copy.deepcopy(model), whiteners(found)
    twin.up, twin.down = WithP(twin.up, P["up"]), WithP(twin.down, P["down"])
    return twin


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_in_the_coordinates_is_adamw_on_a_model_with_p_inside(weight_decay: float) -> None:
    model = net(b_std=0.0)
    found = retention(model)
    twin, P = reference(model, found), whiteners(found)
    options = dict(lr=0.02, betas=(0.8, 0.99), weight_decay=weight_decay)
    opt = optimizer(model, max_kl=None, curvature="none", retain=found, **options)
    theirs = torch.optim.AdamW(trainable(twin), **options)
    train(model, opt, 12)
    train(twin, theirs, 12)
    for name, layer in lora_layers(model).items():
        other = getattr(twin, name)
        torch.testing.assert_close(layer.lora_B.weight, other.lora_B.weight)
        torch.testing.assert_close(layer.lora_A.weight, other.lora_A.weight @ P[name])


def test_the_start_changes_no_function() -> None:
    model = net(b_std=0.0)
    before = model(TEXT[0])
    a, P = {n: layer.lora_A.weight.clone() for n, layer in lora_layers(model).items()}, whiteners(retention(model))
    opt = optimizer(model, retain=retention(model))
    after = model(TEXT[0])  # the first forward pass changes the coordinates
    assert torch.equal(before, after)
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(layer.lora_A.weight, a[name] @ P[name])
    train(model, opt, 1)
    assert all("retain_vectors" in opt.state[pair.A] for pair in opt.pairs)


def test_a_trained_adapter_takes_the_coordinates_alone() -> None:
    model = net()
    before = snapshot(model)
    opt = optimizer(model, retain=TEXT * 3, lr=0.0)
    model(TEXT[0])
    assert same(snapshot(model), before)
    train(model, opt, 1)
    assert all("retain_vectors" in opt.state[pair.A] for pair in opt.pairs) and same(snapshot(model), before)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_the_predicted_kl_is_that_of_the_step_taken(structure: str) -> None:
    model = net(b_std=0.0)
    opt = optimizer(model, lr=0.3, max_kl=1e-3, weight_decay=0.01, factor_structure=structure, retain=retention(model))
    for step in range(6):
        before = weights_of(opt) if step else None
        opt.zero_grad()
        backward(model, batch(step))
        before = weights_of(opt)
        opt.step()
        if step > 1:  # the step uses the factors after their update
            factors = factors_of(opt)
            # Only updates change H and D, so they are still the factors that the step used.
            assert kl_of_step(factors, before, weights_of(opt)) == pytest.approx(
                opt.metrics()["trust/predicted_kl"], rel=1e-6
            )
            assert opt.metrics()["trust/predicted_kl"] <= 1e-3 * (1 + 1e-6)


def test_a_run_goes_on_bit_for_bit_without_the_text(tmp_path: Any) -> None:
    def make(**options: Any) -> tuple[Net, Any]:
        model = net(b_std=0.0)
        return model, optimizer(model, lr=0.05, max_kl=1e-2, calibration_interval=4, **options)

    model, opt = make(retain=TEXT * 3)
    train(model, opt, 5)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "state.pt")
    train(model, opt, 5, 5)
    for retain in (None, "random"):
        again, resumed = make(retain=retain)
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        again.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["opt"])
        train(again, resumed, 5, 5)
        assert same(snapshot(again), snapshot(model))


def test_copies_go_on_alike() -> None:
    model = net(b_std=0.0)
    opt = optimizer(model, lr=0.05, max_kl=1e-2, retain=TEXT * 3)
    pair = copy.deepcopy((model, opt))
    train(model, opt, 4)
    train(*pair, 4)
    assert same(snapshot(pair[0]), snapshot(model))
    pair = copy.deepcopy((model, opt))
    train(model, opt, 4, 4)
    train(*pair, 4, 4)
    assert same(snapshot(pair[0]), snapshot(model))


def test_a_checkpoint_without_retention_is_not_taken_for_one_with_it() -> None:
    plain, opt = net(b_std=0.0), None
    opt = optimizer(plain)
    train(plain, opt, 2)
    with pytest.raises(ValueError, match="without retain"):
        optimizer(net(b_std=0.0), retain=TEXT * 3).load_state_dict(opt.state_dict())


def test_a_damaged_state_is_refused() -> None:
    model = net(b_std=0.0)
    opt = optimizer(model, retain=TEXT * 3)
    train(model, opt, 2)
    for key, broken in (
        ("retain_scales", torch.zeros(3)),
        ("retain_vectors", torch.zeros(4, 3)),
        ("retain_scales", torch.full((9,), float("nan"))),
    ):
        state = copy.deepcopy(opt.state_dict())
        state["state"][0][key] = broken
        with pytest.raises(ValueError, match=key):
            opt.load_state_dict(state)


@pytest.mark.parametrize("resize", ["physical", "masked"])
def test_ranks_move_as_without_retention(resize: str) -> None:
    model = net(b_std=0.0, rank=4)
    scheduler = RankScheduler(interval=4, hysteresis=0.0, absent="sketch", window=2, sketch_rank=3, min_rank=1)
    opt = optimizer(model, lr=0.05, max_kl=1e-2, rank_scheduler=scheduler, resize=resize, retain=TEXT * 3)
    events: list[Any] = []
    opt.on_rank_event(events.append)
    train(model, opt, 3)
    before = model(TEXT[0]).detach()
    train(model, opt, 14, 3)
    assert events and bool(torch.isfinite(model(TEXT[0])).all()) and not torch.equal(before, model(TEXT[0]))
    for pair in opt.pairs:
        assert opt.state[pair.A]["retain_vectors"].shape[1] == pair.A.shape[1]


def test_new_rows_begin_in_the_coordinates() -> None:
    """New rows of A have small components along directions that are strong on retained text."""
    shares = []
    for retain in (None, TEXT * 3):
        model = net(b_std=0.0, rank=2)
        scheduler = RankScheduler(interval=4, budget=5, hysteresis=0.0, absent="sketch", window=4, sketch_rank=4)
        opt = optimizer(model, lr=1e-3, max_kl=1e-4, rank_scheduler=scheduler, retain=retain)
        found = retention(model)
        train(model, opt, 4)
        (pair,) = [p for p in opt.pairs if p.name == "up"]
        assert pair.rank > 2
        rows, strongest = pair.A[2:].detach(), found.statistics["up"].vectors[:, 0]
        shares.append(float((rows @ strongest).norm() / rows.norm()))
    assert shares[1] < shares[0]


def test_start_directions_and_retention() -> None:
    model = net(b_std=0.0)
    initialize(model, [batch(s) for s in range(3)], loss_fn=lambda m, b: nn.functional.cross_entropy(
        m(b[0]).flatten(0, 1), b[1].flatten(), ignore_index=-100))  # fmt: skip
    a, before = model.up.lora_A.weight.detach().clone(), model(TEXT[0])
    opt = optimizer(model, retain=TEXT * 3)
    assert torch.equal(model(TEXT[0]), before) and opt.steps == 0 and not torch.equal(model.up.lora_A.weight, a)


def test_a_layer_that_retained_text_never_reached_learns_in_its_own_coordinates() -> None:
    model = net(b_std=0.0)
    found = retention(model)
    partly = Retention(found.rank, {"up": "up"}, {"up": found.statistics["up"]})
    opt = optimizer(model, lr=0.05, retain=partly)
    train(model, opt, 3)
    assert ["retain_vectors" in opt.state[pair.A] for pair in opt.pairs] == [True, False]


def test_a_frozen_a_stays() -> None:
    model = net(b_std=0.0)
    for layer in lora_layers(model).values():
        layer.lora_A.weight.requires_grad_(False)
    before = model.up.lora_A.weight.clone()
    opt = optimizer(model, lr=0.05, max_kl=1e-2, retain=TEXT * 3)
    train(model, opt, 3)
    assert torch.equal(model.up.lora_A.weight, before)


@pytest.mark.parametrize("retain", ["self", "random"])
def test_named_sources(retain: str) -> None:
    model = net(b_std=0.0)
    opt = optimizer(model, lr=0.05, max_kl=1e-2, retain=retain)
    train(model, opt, 2)
    assert "retain_vectors" in opt.state[opt.pairs[0].A]


@pytest.mark.parametrize(
    ("retain", "error", "says"),
    [("text.txt", ValueError, "'self'"), (3, TypeError, "int"), ({}, TypeError, "dict")],
)
def test_what_cannot_be_retained(retain: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        optimizer(net(), retain=retain)


def test_another_models_retention_is_refused() -> None:
    model = net(b_std=0.0)
    found = retention(model)
    swapped = Retention(4, {"up": "down", "down": "up"}, found.statistics)
    opt = optimizer(model, retain=swapped)
    with pytest.raises(ValueError, match="input features"):
        train(model, opt, 1)


def test_products_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast is off during the computation of a step."""
    model = net(b_std=0.0, dtype=torch.float32)
    opt = optimizer(model, lr=0.05, retain=TEXT * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(model, opt, 2)
    with exact([torch.device("cpu")]):
        assert opt.state[opt.pairs[0].A]["exp_avg"].dtype == torch.float32
