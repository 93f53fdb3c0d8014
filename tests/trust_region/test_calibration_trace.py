"""A measurement of the coupling has no side effects, and gives a reason if it is not possible."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from support import (
    VOCAB,
    backward,
    batch,
    factors_of,
    llama_batch,
    llama_loss,
    loss_of,
    net,
    numbers,
    optimizer,
    snapshot,
    tiny_llama,
    train,
    trainable,
)
from torch import Tensor, nn

from ctr_optim.trust_region import coupling, logits

pytestmark = pytest.mark.usefixtures("a_token_is_enough")


def repeated(data: dict[str, Tensor], times: int = 4) -> dict[str, Tensor]:
    """Return one sequence several times, so that every slice of the batch gives the batch's result."""
    return {key: value[:1].repeat(times, *[1] * (value.dim() - 1)) for key, value in data.items()}


def noisy(interval: int | None, steps: int) -> dict[str, Any]:
    """Train a model with dropout and batch norm; return everything that a measurement could change."""
    model = net(dropout=0.3, norm=True, dtype=torch.float32)
    opt = optimizer(model, lr=1e-2, max_kl=None, calibration_interval=interval)
    opt._trust.loss_scale = None  # Only optimizers that measure observe it, and it weights the factors' samples.
    torch.manual_seed(7)
    random.seed(7)
    for step in range(steps):
        opt.zero_grad()
        backward(model, batch(step))
        grads = [p.grad.clone() for p in trainable(model)]
        opt.step()
        assert all(torch.equal(g, p.grad) for g, p in zip(grads, trainable(model), strict=True))
    opt.zero_grad()
    backward(model, batch(steps))
    return {
        "source": opt.metrics()["trust/source"],
        "state": snapshot(model),
        "grads": [p.grad.clone() for p in trainable(model)],
        "rng": torch.get_rng_state(),
        "python": random.random(),
        "training": [m.training for m in model.modules()],
        "none": [n for n, p in model.named_parameters() if p.grad is None],
    }


# -- no side effects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5])
def test_a_measurement_leaves_no_trace(steps: int) -> None:
    measured, plain = noisy(1, steps), noisy(None, steps)
    assert (measured["source"], plain["source"]) == ("measured", "block-diagonal")
    for key in measured["state"]:
        assert torch.equal(measured["state"][key], plain["state"][key]), key
    assert all(torch.equal(a, b) for a, b in zip(measured["grads"], plain["grads"], strict=True))
    assert torch.equal(measured["rng"], plain["rng"])
    for key in ("python", "training", "none"):
        assert measured[key] == plain[key]


def test_a_measurement_does_not_touch_the_factors() -> None:
    found = []
    for interval in (1, None):
        model = net()
        opt = optimizer(model, lr=1e-2, max_kl=None, calibration_interval=interval, factor_structure="dense")
        opt._trust.loss_scale = None  # Only optimizers that measure observe it, and it weights the factors' samples.
        train(model, opt, 4)
        found.append(factors_of(opt))
    for name, f in found[0].items():
        assert all(torch.equal(f[k], found[1][name][k]) for k in f)


def test_a_transformer_with_dropout_trains_as_without_measurements() -> None:
    grads = []
    for interval in (1, None):
        model = tiny_llama(torch.float32, dropout=0.2)
        opt = optimizer(model, max_kl=None, calibration_interval=interval)
        torch.manual_seed(3)
        for step in range(2):
            opt.zero_grad()
            llama_loss(model, llama_batch(step)).backward()
            opt.step()
        grads.append([p.grad.clone() for p in trainable(model)])
        assert opt.metrics()["trust/source"] == ("measured" if interval else "block-diagonal")
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_measurements_under_autocast_run_under_autocast() -> None:
    model, seen = net(dtype=torch.float32), []
    model.head.register_forward_hook(lambda m, args, out: seen.append((out.dtype, torch.is_grad_enabled())))
    opt = optimizer(model, calibration_interval=1)
    ids, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model(ids).float(), labels)
    loss.backward()
    opt.step()
    assert seen[0] == (torch.bfloat16, True)
    assert len(seen) >= 3 and set(seen[1:]) == {(torch.bfloat16, False)}
    assert opt.metrics()["trust/source"] == "measured"


def test_measurements_happen_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_EXPECTED", "_USUAL_ERROR"):
        monkeypatch.setattr(coupling, name, math.inf)  # No measurement is unexpected.
    model, calls = net(), []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    opt = optimizer(model, calibration_interval=4, lr=1e-3)
    counts = []
    for step in range(37):
        calls.clear()
        train(model, opt, 1, step)
        counts.append(calls.count(False))
    # the first steps, then every fourth step
    assert [step for step, count in enumerate(counts) if count] == [*range(24), 24, 28, 32, 36]
    assert set(counts[24:]) == {0, 1, 2}  # one pass at theta + delta, sometimes one without the adapter


def fused(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Remove the logits from a training forward pass, as Liger does."""
    if module.training and torch.is_grad_enabled() and (kwargs.keys() & {"labels", "shift_labels"}):
        output["logits"] = None
    return output


# -- training forward passes without logits ----------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [False, True])
def test_models_that_give_a_loss_or_logits_are_asked_again(shifted: bool) -> None:
    """A last layer fused with the loss gives the same coupling, and prompt tokens still do not count."""
    found = []
    for fuse in (False, True):
        model, data = tiny_llama(), repeated(llama_batch())
        data["labels"][:, :4] = -100
        if shifted:
            ignored = torch.full_like(data["labels"][:, :1], -100)
            data["shift_labels"] = torch.cat([data["labels"][:, 1:], ignored], 1)
        if fuse:
            model.get_base_model().register_forward_hook(fused, with_kwargs=True)
        opt = optimizer(model, lr=1.0, max_kl=1e-3, calibration_interval=1)
        for _ in range(2):
            opt.zero_grad()
            output = model(**data)
            assert (output.logits is None) == fuse
            output.loss.backward()
            opt.step()
        found.append(opt.metrics())
    assert found[1]["trust/source"] == "measured"
    assert found[1]["trust/coupling"] == pytest.approx(found[0]["trust/coupling"], rel=1e-3)
    assert found[1]["kl_from_base"] == pytest.approx(found[0]["kl_from_base"], rel=1e-3)


def test_no_more_logits_are_made_than_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "MOST_TOKENS", 3)
    model, data = tiny_llama(), repeated(llama_batch())
    model.get_base_model().register_forward_hook(fused, with_kwargs=True)
    opt = optimizer(model, lr=1.0, max_kl=1e-3, calibration_interval=1)
    made: list[int] = []
    model(**data).loss.backward()
    model.get_base_model().lm_head.register_forward_hook(lambda *call: made.append(call[-1].shape[:-1].numel()))
    opt.step()
    assert opt.metrics()["trust/source"] == "measured"
    assert made and set(made) == {3}


def test_a_wrapper_that_knows_no_rows_to_keep_is_asked_for_all() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama()
            self.model.get_base_model().register_forward_hook(fused, with_kwargs=True)

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            return self.model(input_ids=input_ids, labels=labels)

    data = llama_batch()
    opt = optimizer(model := Wrapper(), lr=1.0, max_kl=1e-3, calibration_interval=1)
    model(data["input_ids"], labels=data["labels"]).loss.backward()
    opt.step()
    assert opt.metrics()["trust/source"] == "measured"


def test_a_model_that_cannot_do_without_labels_is_left_alone() -> None:
    class Wants(LossOnly):
        def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            if labels is None:
                raise ValueError("labels are wanted")
            return super().forward(ids, labels)

    ids, labels = batch(ignored=0)
    opt = optimizer(model := Wants(), lr=1.0, max_kl=1e-3, calibration_interval=1)
    model(ids, labels=labels)["loss"].backward()
    opt.step()
    assert "without labels: labels are wanted" in opt.metrics()["trust/source"]


class LossOnly(nn.Module):
    """Model that returns only a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.net.down(self.net.up(self.net.embed(ids)).tanh()), labels % 7)}


class Stream(nn.Module):
    """Model that reads its batch from an iterator, so that a re-run would use another batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, source: Any) -> Tensor:
        x = next(source)
        return self.net.head(self.net.down(self.net.up(self.net.embed(x)).tanh()))


# -- measurements that are not possible --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no logits", "iterator"])
def test_a_fallback_says_so(kind: str) -> None:
    ids, labels = batch(ignored=0)
    model = LossOnly() if kind == "no logits" else Stream()
    opt = optimizer(model, lr=1.0, max_kl=1e-3, calibration_interval=1)
    for _ in range(2):
        opt.zero_grad()
        loss = model(ids, labels)["loss"] if kind == "no logits" else loss_of(model(iter([ids])), labels)
        loss.backward()
        opt.step()
    found = opt.metrics()
    assert found["trust/source"].startswith("assumed (")
    assert ("logits" if kind == "no logits" else "list_iterator") in found["trust/source"]
    assert found["trust/predicted_kl"] == pytest.approx(1e-3)
    assert found["trust/coupling"] > 1


def test_the_source_before_the_first_step() -> None:
    assert optimizer(net(), calibration_interval=1).metrics()["trust/source"] == "assumed (not measured yet)"
    assert optimizer(net(), calibration_interval=None).metrics()["trust/source"] == "block-diagonal"


def test_a_model_may_return_a_tuple_a_dict_or_chunks_of_logits() -> None:
    class Wrapped(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.net, self.kind = net(), kind

        def forward(self, ids: Tensor) -> Any:
            logits = self.net(ids)
            if self.kind == "chunks":  # The first chunk contains no loss token.
                return list(logits.split(2, 1))
            return {"logits": logits} if self.kind == "dict" else (logits, None)

    couplings = []
    for kind in ("dict", "chunks", "tuple"):
        model = Wrapped(kind)
        opt = optimizer(model, calibration_interval=1)
        ids, labels = batch()
        out = model(ids)
        logits = out["logits"] if kind == "dict" else out[0] if kind == "tuple" else torch.cat(out, 1)
        loss_of(logits, labels).backward()
        opt.step()
        assert opt.metrics()["trust/source"] == "measured"
        couplings.append(opt.metrics()["trust/coupling"])
    assert couplings[0] == couplings[1] == couplings[2]
    assert model(ids)[0].shape[-1] == VOCAB


def test_a_model_that_shapes_its_output_by_the_batch_is_measured_on_the_whole_batch() -> None:
    class Trimmed(nn.Module):
        """Model that trims the batch to its longest sequence (0 is padding)."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(ids[:, : int((ids != 0).sum(1).max())])

    model, (ids, labels) = Trimmed(), batch(ignored=0)
    ids = ids.clamp_min(1)
    ids[0, 3:] = 0  # The slice is the first sequence.
    opt = optimizer(model, lr=1.0, max_kl=1e-3, calibration_interval=1)
    loss_of(model(ids), labels).backward()
    opt.step()
    assert opt.metrics()["trust/source"] == "measured"
    assert opt._trust.coupling.prober.share == 1.0


@pytest.mark.parametrize("what", ["nan", "nothing"])
def test_a_measurement_that_is_no_number_is_dropped(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    opt = optimizer(model, lr=1.0, max_kl=1e-3, calibration_interval=1)
    train(model, opt, 1)
    before, probe = opt.metrics()["trust/coupling"], opt._trust.coupling.prober
    logits = probe.logits
    monkeypatch.setattr(probe, "logits", lambda: torch.full_like(logits(), torch.nan) if what == "nan" else None)
    usual = numbers(opt)["coupling"]
    train(model, opt, 1, 1)
    assert numbers(opt)["coupling"] == usual and numbers(opt)["calibrations"] == 1 and before > 0
    assert opt.metrics()["trust/predicted_kl"] <= 1e-3 * (1 + 1e-6)


def test_a_fresh_adapter_is_the_base_model() -> None:
    """With B = 0 the KL from the base model is 0 in the first step; the second step can measure it."""
    model = net(b_std=0.0)
    opt = optimizer(model, lr=1e-2, max_kl=1e-3, calibration_interval=1)
    train(model, opt, 1)
    assert numbers(opt)["coupling"] is not None and numbers(opt)["base_coupling"] is None
    train(model, opt, 1, 1)
    assert numbers(opt)["base_coupling"] is not None
