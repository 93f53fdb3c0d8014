"""The measured coupling is exact."""

from __future__ import annotations

import pytest
import torch
from support import (
    backward,
    batch,
    exact_kl,
    factors_of,
    kl_of_step,
    llama_batch,
    llama_loss,
    net,
    optimizer,
    snapshot,
    tiny_llama,
    weights_of,
)
from torch import Tensor, nn

from ctr_optim.runtime.displacement import Moved
from ctr_optim.trust_region.coupling import SLOPE_EXPONENT
from ctr_optim.trust_region.logits import MOST_TOKENS, kl_divergence

ALL = torch.ones(20, dtype=torch.bool)
pytestmark = pytest.mark.usefixtures("a_token_is_enough")

# -- the formulas ------------------------------------------------------------------------------------------------------


def test_a_single_output_is_a_unit_gaussian() -> None:
    z, d = torch.randn(6, 1, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    total, count = kl_divergence(z, z + d, ALL[:6])
    torch.testing.assert_close(total, 0.5 * d.square().sum())
    assert float(count) == 6


def test_kl_divergence_is_exact() -> None:
    p, q = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    total, count = kl_divergence(p, q, ALL[:8])
    torch.testing.assert_close(total, exact_kl(p, q).sum())
    assert float(count) == 8


def test_only_tokens_that_count_are_summed_over_all_pieces() -> None:
    p, q = torch.randn(700, 5, dtype=torch.float64), torch.randn(700, 5, dtype=torch.float64)
    counts = torch.rand(700) < 0.3
    total, count = kl_divergence(p, q, counts)
    torch.testing.assert_close(total, exact_kl(p, q)[counts].sum())
    assert float(count) == int(counts.sum())
    assert kl_divergence(p.bfloat16(), q.bfloat16(), counts)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moved_parameters_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    params = [torch.randn(3, 4).to(dtype), torch.randn(3, 4).to(dtype)]
    before, delta = [p.clone() for p in params], torch.randn(2, 3, 4)
    with Moved([(params, delta)], 0.1):
        for p, q, d in zip(params, before, delta, strict=True):
            torch.testing.assert_close(p, (q.float() + 0.1 * d).to(dtype), rtol=1e-2, atol=1e-2)
            assert not torch.equal(p, q)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    with pytest.raises(RuntimeError, match="inside"), Moved([(params, None)]):
        assert all((p == 0).all() for p in params)
        raise RuntimeError("inside")
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def repeated(data: dict[str, Tensor], times: int = 4) -> dict[str, Tensor]:
    """Return one sequence several times, so that every slice of the batch gives the batch's result."""
    return {key: value[:1].repeat(times, *[1] * (value.dim() - 1)) for key, value in data.items()}


def llama_logits(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits = model(**{k: v for k, v in data.items() if k != "labels"}).logits
    return logits[data["labels"] != -100]


# -- on models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_kl", [1e-4, 1e-5])
def test_the_predicted_kl_of_a_transformers_step_is_the_measured_one(max_kl: float) -> None:
    model, data = tiny_llama(), repeated(llama_batch())
    opt = optimizer(model, lr=1.0, max_kl=max_kl, calibration_interval=1)
    before = llama_logits(model, data)
    llama_loss(model, data).backward()
    opt.step()
    found = opt.metrics()
    assert found["trust/source"] == "measured"
    measured = float(exact_kl(before, llama_logits(model, data)).mean())
    assert found["trust/predicted_kl"] == pytest.approx(max_kl, rel=1e-6)
    assert measured == pytest.approx(max_kl, rel=0.1)


@pytest.mark.parametrize("structure", ["diagonal", "dense", "lowrank"])
def test_whatever_the_structure_the_first_prediction_is_calibrated(structure: str) -> None:
    model, (ids, labels) = net(), batch()
    ids, labels = ids[:1].repeat(4, 1), labels[:1].repeat(4, 1)
    opt = optimizer(model, lr=1.0, max_kl=1e-4, calibration_interval=1, factor_structure=structure)
    with torch.no_grad():
        before = model(ids)[labels != -100]
    backward(model, (ids, labels))
    opt.step()
    with torch.no_grad():
        measured = float(exact_kl(before, model(ids)[labels != -100]).mean())
    assert measured == pytest.approx(1e-4, rel=0.05)


def test_the_coupling_is_the_ratio_of_measured_and_block_diagonal_kl() -> None:
    model, data = tiny_llama(), repeated(llama_batch())
    opt = optimizer(model, lr=1.0, max_kl=1e-5, calibration_interval=1, factor_structure="dense")
    before, weights = llama_logits(model, data), weights_of(opt)
    llama_loss(model, data).backward()
    opt.step()
    measured = float(exact_kl(before, llama_logits(model, data)).mean())
    plain = kl_of_step(factors_of(opt), weights, weights_of(opt))
    assert opt.metrics()["trust/coupling"] == pytest.approx(measured / plain, rel=0.05)


def test_measurements_are_averaged_but_for_what_the_slope_explains() -> None:
    """The average is over square roots; the newest has weights 1, 5/6, ..., 5/23. A drift of slopes has no effect."""
    model = net()
    opt = optimizer(model, lr=1.0, max_kl=1e-3, calibration_interval=1, factor_decay=0.0, factor_structure="dense")
    ids, labels = batch(3)
    ids, labels = ids[:1].repeat(8, 1), labels[:1].repeat(8, 1)
    level = 0.0
    for step in range(19):  # In later steps the model has learned the row, and the KL is not quadratic.
        weights, before = weights_of(opt), snapshot(model)
        with torch.no_grad():
            logits = model(ids)[labels != -100]
        opt.zero_grad()
        backward(model, (ids, labels))
        opt.step()
        with torch.no_grad():
            measured = float(exact_kl(logits, model(ids)[labels != -100]).mean())
        numbers = opt.state_dict()["param_groups"][0]["ctr"]
        relative = numbers["loss_scale_unit"] / numbers["loss_scale"]  # without memory, the scale of this step
        form = 2 * kl_of_step(factors_of(opt), weights, weights_of(opt))
        moves = (
            (p.grad * (p.detach() - before[name])).sum() for name, p in model.named_parameters() if p.requires_grad
        )
        explained, weight = (float(sum(moves)) ** 2 / form) ** SLOPE_EXPONENT, max(0.2, 5 / (step + 5))
        level = ((1 - weight) * level**0.5 + weight * (2 * measured / (form * relative) / explained) ** 0.5) ** 2
        state = opt._trust.coupling.state
        assert state.coupling / state.alignment**SLOPE_EXPONENT == pytest.approx(level, rel=0.05)
        # A measured step uses at least its own coupling, measured at about its final length.
        expected = max(level * explained * relative, 2 * measured / form)
        assert opt.metrics()["trust/coupling"] == pytest.approx(expected, rel=0.1)


def test_the_kl_from_the_base_model_is_measured_too() -> None:
    model, (ids, labels) = net(), batch()
    ids, labels = ids[:1].repeat(4, 1), labels[:1].repeat(4, 1)
    opt = optimizer(model, lr=1e-3, max_kl=1e-6, calibration_interval=1)
    for _ in range(4):
        opt.zero_grad()
        backward(model, (ids, labels))
        with torch.no_grad():
            here = model(ids)[labels != -100]
        opt.step()
    with torch.no_grad():
        for pair in opt.pairs:
            pair.B.zero_()
        base = model(ids)[labels != -100]
    expected = float(exact_kl(here, base).mean())
    assert opt.metrics()["kl_from_base"] == pytest.approx(expected, rel=0.01)


def test_only_loss_tokens_count() -> None:
    """Without attention, the prompts of the sequences do not change the coupling."""
    found = []
    for seed in (0, 1):
        ids, labels = batch(0, ignored=3)
        ids[:, :3] = batch(seed + 5)[0][:, :3]
        model = net()
        opt = optimizer(model, lr=1.0, max_kl=1e-4, calibration_interval=1)
        backward(model, (ids, labels))
        opt.step()
        found.append(opt.metrics()["trust/coupling"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("kind", ["plain", "dropout", "norm", "transformers"])
def test_what_the_training_said_is_used_where_a_second_forward_would_say_the_same(kind: str) -> None:
    if kind == "transformers":
        model, data = tiny_llama(), llama_batch(n=8)
        opt = optimizer(model, calibration_interval=1)
        llama_loss(model, data).backward()
    else:
        model, data = net(dropout=0.3 if kind == "dropout" else 0.0, norm=kind == "norm"), batch(n=8)
        opt = optimizer(model, calibration_interval=1)
        backward(model, data)
    probe = opt._trust.coupling.prober
    again, calls = probe.logits(), []
    assert again is not None
    assert probe._call.sequences == (1 if kind in ("dropout", "norm") else 2)  # two passes of half the sequences
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    # The re-run restores the random state, so dropout is equal.
    torch.testing.assert_close(probe.logits_in_training(), again)
    assert bool(calls) == (kind in ("dropout", "norm"))


def test_of_many_tokens_some_are_looked_at_evenly_spaced() -> None:
    model, (ids, labels) = net(), batch(n=2, length=2 * MOST_TOKENS + 1, ignored=MOST_TOKENS)
    opt = optimizer(model, calibration_interval=1, lr=1.0, max_kl=1e-4)
    backward(model, (ids, labels))
    probe = opt._trust.coupling.prober
    here = probe.logits_in_training()
    with torch.no_grad():
        torch.testing.assert_close(here, model(ids[:1])[0, ::3])
    assert torch.equal(probe.loss_tokens(here), labels[0, ::3] != -100)
    opt.step()
    assert opt.metrics()["trust/source"] == "measured"
