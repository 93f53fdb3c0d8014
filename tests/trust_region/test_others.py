"""The bound on tokens outside the loss: the measured ratio, the step's exact KL on prompts, padding, checkpoints."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import needs_gloo, spawn
from support import (
    backward,
    batch,
    exact_kl,
    llama_batch,
    llama_loss,
    net,
    numbers,
    same,
    snapshot,
    tiny_llama,
    trainable,
)
from torch import Tensor, nn

from ctr_optim import CTROptimizer
from ctr_optim.trust_region import kept, others
from ctr_optim.trust_region.bound import BOUNDS, Auto, Evidence
from ctr_optim.trust_region.coupling import Coupling
from ctr_optim.trust_region.logits import MOST_TOKENS
from ctr_optim.trust_region.others import MOST_OTHERS, Others, averaged, outside_the_loss, ratio
from ctr_optim.trust_region.probe import Probe

NEVER_BINDS = 1e9
PROMPT = 5
NAME = "outside"  # of the bound in the registry, during a test


@pytest.fixture(autouse=True)
def few_tokens_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LEAST_TOKENS", 1)
    monkeypatch.setattr(others, "LEAST_OTHERS", 1)
    monkeypatch.setitem(BOUNDS, NAME, Auto)  # so that it is removed after the test


def bounded(model: nn.Module, outside: float, max_kl: float = 1e-5, **options: Any) -> CTROptimizer:
    """Return the optimizer with a limit outside the loss, whose other factors are 1 on new rows at a constant rate."""
    BOUNDS[NAME] = type("Outside", (Auto,), dict(outside=outside, enough=1.0, patience=1e9, repeats=0.0))
    return CTROptimizer(trainable(model), model=model, max_kl=max_kl, kl_schedule=NAME, **options)


def rows(seed: int = 0, times: int = 4) -> dict[str, Tensor]:
    """Return one sequence several times, so that every slice of the batch gives the batch's result."""
    data = llama_batch(seed, n=1, length=12, prompt=PROMPT)
    return {key: value.repeat(times, 1) for key, value in data.items()}


def logits_of(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**{k: v for k, v in data.items() if k != "labels"}).logits


def kls(before: Tensor, after: Tensor, data: dict[str, Tensor]) -> tuple[float, float]:
    """Return the exact KL per loss token, and per token of the prompt: the labels are already shifted by one."""
    kl, inside = exact_kl(before, after), data["labels"] != -100
    prompt = data["attention_mask"].bool() & ~inside
    return float(kl[inside].mean()), float(kl[prompt].mean())


def taken(outside: float, max_kl: float) -> tuple[float, float, dict[str, Any]]:
    """Return the exact KLs of one step inside and outside the loss, and its metrics."""
    model, data = tiny_llama(), rows()
    opt = bounded(model, outside, max_kl)
    before = logits_of(model, data)
    llama_loss(model, data).backward()
    opt.step()
    return *kls(before, logits_of(model, data), data), opt.metrics()


# -- on models ---------------------------------------------------------------------------------------------------------


def test_the_measured_ratio_is_exact() -> None:
    inside, outside, found = taken(NEVER_BINDS, 1e-3)
    assert found["trust/other_ratio"] == pytest.approx(outside / inside, rel=0.05)
    assert found["trust/factor/other_tokens"] == 1.0
    assert inside == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("limit", [5e-4, 2e-4])
def test_the_kl_of_a_step_outside_the_loss_is_its_limit(limit: float) -> None:
    inside, outside, found = taken(limit, max_kl=0.1)
    assert outside == pytest.approx(limit, rel=0.1)
    assert inside < 0.01 and found["trust/factor/other_tokens"] < 0.1
    assert found["trust/predicted_kl"] == pytest.approx(found["trust/max_kl"], rel=1e-6)
    assert found["trust/max_kl"] * found["trust/other_ratio"] == pytest.approx(limit, rel=1e-6)


def test_padding_does_not_count() -> None:
    """Other tokens in the padding change neither the ratio nor the step."""
    found = []
    for filler in (3, 7):
        model, data = tiny_llama(), rows()
        for key, value in (("input_ids", filler), ("labels", -100), ("attention_mask", 0)):
            data[key] = torch.cat([data[key], torch.full((4, 6), value)], 1)
        data["position_ids"] = torch.arange(18).expand(4, 18)
        opt = bounded(model, NEVER_BINDS)
        before = logits_of(model, data)
        llama_loss(model, data).backward()
        opt.step()
        inside, outside = kls(before, logits_of(model, data), data)
        found.append(opt.metrics()["trust/other_ratio"])
        assert found[-1] == pytest.approx(outside / inside, rel=0.05)
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_without_the_limit_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "divergence_outside", None)  # A call would raise.
    model, data = tiny_llama(), rows()
    opt = CTROptimizer(trainable(model), model=model)
    llama_loss(model, data).backward()
    opt.step()
    assert not opt._bound.needs_others and opt._trust.coupling.others is None
    assert not any("other" in key for key in [*opt.metrics(), *numbers(opt)])


def test_a_limit_that_never_binds_changes_no_step() -> None:
    ends = []
    for limit in (math.inf, NEVER_BINDS):
        model = tiny_llama()
        opt = bounded(model, limit)
        for seed in range(3):
            opt.zero_grad()
            llama_loss(model, llama_batch(seed, length=12, prompt=PROMPT)).backward()
            opt.step()
        ends.append(snapshot(model))
    assert same(*ends)


def test_a_sample_of_many_tokens_holds_tokens_outside_the_loss() -> None:
    """Where the loss tokens are a small part of a long sequence, they are compared alone without the limit."""
    length = 2 * MOST_TOKENS
    for limit, expected in ((math.inf, 8), (NEVER_BINDS, 8 + MOST_OTHERS)):
        model = net()
        opt = bounded(model, limit)
        kept.LEAST_TOKENS = 8  # so that the evenly spaced rows have too few loss tokens
        backward(model, batch(n=1, length=length, ignored=length - 8))
        probe = opt._trust.coupling.prober
        assert isinstance(probe, Probe)
        here = probe.logits_in_training()
        assert here is not None and abs(len(here) - expected) <= 2
        inside = probe.loss_tokens(here)
        assert int(inside.sum()) == 8
        if limit == NEVER_BINDS:
            outside = probe.divergence_outside(here, here)
            assert outside is not None and int(outside[1]) == len(here) - 8


# -- processes and checkpoints -----------------------------------------------------------------------------------------


def _steps(rank: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Train on two rows of each process in turn. The second process has no tokens outside the loss."""
    model = net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    opt = bounded(wrapped, 1e-4, 1e-3)
    for seed in range(4):
        opt.zero_grad()
        backward(wrapped, batch(2 * seed + rank, n=2, length=8, ignored=0 if rank else PROMPT))
        opt.step()
    return snapshot(model), opt.metrics(), numbers(opt)


@needs_gloo
def test_two_processes_have_the_same_ratio(tmp_path: Path) -> None:
    one, two = spawn(_steps, tmp_path)
    assert same(one[0], two[0]) and one[1:] == two[1:]
    assert one[2]["others_measured"] == 4 and one[1]["trust/factor/other_tokens"] < 1


def run(model: nn.Module, opt: CTROptimizer, seeds: range) -> list[float]:
    found = []
    for seed in seeds:
        opt.zero_grad()
        backward(model, batch(seed, length=8, ignored=PROMPT))
        opt.step()
        found.append(opt.metrics()["trust/factor/other_tokens"])
    return found


def test_the_ratio_continues_after_a_checkpoint() -> None:
    model, other = net(), net()
    one = bounded(model, 1e-4, 1e-3, calibration_interval=50)
    run(model, one, range(3))
    other.load_state_dict(model.state_dict())
    two = bounded(other, 1e-4, 1e-3, calibration_interval=50)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert numbers(two)["others_ratio"] == numbers(one)["others_ratio"] > 0
    assert run(model, one, range(3, 5)) == run(other, two, range(3, 5))
    assert same(snapshot(model), snapshot(other))


def test_a_checkpoint_without_the_ratio_loads() -> None:
    model, other = net(), net()
    BOUNDS[NAME] = Auto
    one = CTROptimizer(trainable(model), model=model, max_kl=1e-5, kl_schedule=NAME)
    backward(model, batch())
    one.step()
    state = copy.deepcopy(one.state_dict())
    assert "others_ratio" not in state["param_groups"][0]["ctr"]
    two = bounded(other, 1e-4)
    two.load_state_dict(state)
    assert numbers(two)["others_ratio"] is None and numbers(two)["others_measured"] == 0
    run(other, two, range(1))
    assert numbers(two)["others_measured"] == 1


# -- the maths ---------------------------------------------------------------------------------------------------------


def test_positions_outside_the_loss_predict_a_real_token() -> None:
    inside = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]], dtype=torch.bool)
    real = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    ids = torch.zeros(2, 6, dtype=torch.long)
    found = outside_the_loss({"input_ids": ids, "attention_mask": real}, inside)
    assert found is not None and found.int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]
    found = outside_the_loss({"input_ids": ids}, inside)
    assert found is not None and found.int().tolist() == [[1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0]]
    everything = torch.tensor([[True] * 5 + [False]])
    assert not outside_the_loss({}, everything).any()  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 6, 2)])
def test_logits_of_another_shape_than_the_tokens_are_left_out(shape: tuple[int, ...]) -> None:
    """One prediction per sequence, logits of the last positions only, and images."""
    mask = torch.zeros(shape, dtype=torch.bool)
    assert outside_the_loss({"input_ids": torch.zeros(4, 6, dtype=torch.long)}, mask) is None
    assert outside_the_loss({"attention_mask": torch.ones(4, 1, 6, 6)}, mask) is None


def test_masked_language_models_are_left_out() -> None:
    """Their logits at a position outside the loss repeat a token that they see."""

    class ForMaskedLM(type(net())):  # type: ignore[misc]
        config = object()

    model = net()
    model.__class__ = ForMaskedLM
    opt = bounded(model, 1e-9)
    backward(model, batch(length=8, ignored=PROMPT))
    opt.step()
    assert numbers(opt)["others_measured"] == 0 and "trust/factor/other_tokens" not in opt.metrics()


def test_the_bound_is_the_smaller_of_both_limits() -> None:
    class Both(Auto):
        outside = 0.01

    def limit(**evidence: Any) -> float:
        factors = Both(0.1).factors(Evidence(0.5, flat=25, **evidence))
        return 0.1 * math.prod(map(float, factors.values()))

    follows = 0.5**2 / 2  # schedule and constant rate
    few = torch.tensor(64.0)
    assert limit(others=None) == pytest.approx(0.1 * follows)
    assert limit(others=0.05) == pytest.approx(0.1 * follows)
    assert limit(others=2.0) == pytest.approx(0.01 / 2 * follows)
    assert limit(others=0.2, tokens=few) == pytest.approx(0.1 / 4 * follows)
    assert limit(others=2.0, tokens=few) == pytest.approx(0.01 / 2 * follows)  # not lowered twice
    assert "other_tokens" not in Auto(0.1).factors(Evidence(1.0, others=9.0))
    assert not Both(None).needs_others and Both(None).factors(Evidence(1.0, others=9.0))["schedule"] == 1.0


def test_the_ratio_of_too_few_tokens_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "LEAST_OTHERS", 32)
    inside = torch.tensor(0.5, dtype=torch.float64)
    assert ratio((torch.tensor(31.0), torch.tensor(31.0)), inside).isnan()
    assert float(ratio((torch.tensor(32.0), torch.tensor(32.0)), inside)) == 2.0
    found = Others()
    for nothing in (None, (torch.tensor(3.0), torch.tensor(3.0))):
        found.look(nothing, inside)
        found.settle()
    assert found.along() is None and found.state.others_measured == 0


def test_one_measurement_far_off_moves_the_average_little() -> None:
    value, low = 1.0, 1.0
    for count in range(20, 22):
        value, low = averaged(value, 100.0, count), averaged(low, 1e-6, count)
    assert 1 < value < 25 and low >= 1 / 16
    assert averaged(None, 3.0, 0) == pytest.approx(3.0) == averaged(7.0, 3.0, 0)


def test_a_measured_step_has_at_least_its_own_ratio() -> None:
    found = Others()
    for value in [1.0] * 10 + [4.0]:
        found.begin()
        found.look((torch.tensor(100.0 * value), torch.tensor(100.0)), torch.tensor(1.0))
        found.settle()
    usual = found.state.others_ratio
    assert found.along() == 4.0 and usual is not None and 1 < usual < 4
    found.begin()
    assert found.along() == usual
    assert Coupling(None, lambda: None, None).others is None  # type: ignore[arg-type, return-value]
