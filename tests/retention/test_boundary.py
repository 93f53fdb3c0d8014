"""Steps along the boundary of a budget: the projection, the gradient of the KL, and runs with a full budget."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import needs_fsdp2, needs_gloo, spawn
from support import Net, backward, batch, exact_kl, lora_layers, net, optimizer, same, snapshot, tiny_llama, train
from torch import Tensor

from ctr_optim import CTROptimizer
from ctr_optim.curvature.kfac import KFAC
from ctr_optim.retention.boundary import GRADIENT, projected
from ctr_optim.retention.meter import GRADIENT_TOKENS, TextMeter

TEXT = [batch(100 + seed, n=8)[0] for seed in range(4)]
FULL: dict[str, Any] = dict(lr=0.05, max_kl=3e-4, calibration_interval=4, kl_budget=3e-3)


class Diagonal:
    """A stack of two parameters ``(2, 3)`` with a diagonal preconditioner; the second one may stand still."""

    def __init__(self, metric: Tensor, moving: float = 1.0) -> None:
        self.metric, self.moving, self.params = metric, moving, [object(), object()]

    def live(self, finite: Tensor) -> Tensor:
        return finite.double() * torch.tensor([1.0, self.moving], dtype=torch.float64)

    def preconditioned(self, grad: Tensor) -> Tensor:
        return grad / self.metric


def drawn(seed: int, moving: float = 1.0) -> tuple[Diagonal, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    metric, delta, gradient = (torch.randn(2, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    return Diagonal(metric.exp(), moving), delta, gradient


YES, NO = torch.tensor(True), torch.tensor(False)


@given(st.integers(0, 10_000), st.floats(-3, 3))
def test_the_projected_step_is_the_nearest_within_the_room(seed: int, room: float) -> None:
    stack, delta, gradient = drawn(seed)
    found, change = projected({stack: delta}, {stack: gradient}, room, YES)
    along = float((gradient * delta).sum())
    if along <= room:
        assert torch.equal(found[stack], delta) and float(change) == pytest.approx(along)
        return
    assert float((gradient * found[stack]).sum()) == pytest.approx(room, abs=1e-9)
    assert float(change) == pytest.approx(room, abs=1e-9)
    distance = float((stack.metric * (found[stack] - delta).square()).sum())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):  # Any other step within the room is farther away.
        other = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64) + found[stack]
        other -= gradient * ((gradient * other).sum() - room).clamp_min(0) / gradient.square().sum()
        assert float((stack.metric * (other - delta).square()).sum()) >= distance - 1e-9


@given(st.integers(0, 10_000))
def test_only_moving_parameters_are_projected(seed: int) -> None:
    stack, delta, gradient = drawn(seed, moving=0.0)
    delta[1] = 0
    found, _ = projected({stack: delta}, {stack: gradient}, -1.0, YES)
    assert torch.equal(found[stack][1], delta[1])
    assert float((gradient * found[stack]).sum()) <= -1.0 + 1e-9
    assert torch.equal(projected({stack: delta}, {stack: gradient}, -1.0, NO)[0][stack], delta)


@pytest.mark.parametrize("retain", [None, TEXT])
def test_the_preconditioner_is_that_of_the_step(retain: list[Tensor] | None) -> None:
    """At the first step, Adam's averages are the gradient itself, so the step is ``-P^-1 g``."""
    model = net()
    opt = optimizer(model, lr=0.05, max_kl=None, retain=retain)
    backward(model, batch(0, n=16))
    before = {p: p.detach().clone() for p in opt.param_groups[0]["params"]}
    opt.step()
    for stack in opt._stack():
        found = stack.preconditioned(torch.stack([p.grad for p in stack.params]))
        for p, back in zip(stack.params, found, strict=True):
            torch.testing.assert_close(p.detach() - before[p], -back, rtol=1e-6, atol=1e-12)


def base_of(model: Net) -> Net:
    base = copy.deepcopy(model)
    for layer in lora_layers(base).values():
        torch.nn.init.zeros_(layer.lora_B.weight)
    return base.requires_grad_(False)


def oracle(model: Net, ids: Tensor, counts: Tensor | None = None) -> list[Tensor]:
    """Return autograd's gradient of the mean KL from the base model, for A and B of every layer."""
    kl = exact_kl(base_of(model)(ids), model(ids))
    weights = [w for layer in lora_layers(model).values() for w in (layer.lora_A.weight, layer.lora_B.weight)]
    return list(torch.autograd.grad((kl if counts is None else kl[counts]).mean(), weights))


def test_the_gradient_on_text_is_exact_and_leaves_no_trace() -> None:
    model = net(b_std=0.1)
    opt = optimizer(model, calibration_interval=4, retain=TEXT, kl_budget=10.0)
    backward(model, batch(0))
    grads = [p.grad.clone() for p in opt._budget.meter.parameters]
    rows = copy.deepcopy(opt._trust.rows.state)
    found = opt._budget.meter.gradient(0)
    for got, expected in zip(found, oracle(model, torch.cat(TEXT)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(p.grad, g) for p, g in zip(opt._budget.meter.parameters, grads, strict=True))
    assert opt._trust.rows.state == rows and model.training


def test_the_gradient_on_the_batch_is_exact() -> None:
    model = net(b_std=0.1)
    opt = optimizer(model, calibration_interval=4, kl_budget=10.0)
    ids, labels = batch(0)
    backward(model, (ids, labels))
    opt._budget.meter.measure()
    found = opt._budget.meter.gradient(0)
    for got, expected in zip(found, oracle(model, ids, labels != -100), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_gradients_take_turns_on_long_text() -> None:
    model = net(b_std=0.1)
    text = [batch(seed, n=200)[0] for seed in range(2)]
    opt = optimizer(model, calibration_interval=4, retain=text, kl_budget=10.0)
    meter = opt._budget.meter
    first, second, third, again = (meter.gradient(turn)[0] for turn in (0, 1, 2, 10))
    assert not torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(first, meter.gradient(0)[0])
    rows = -(-GRADIENT_TOKENS // 6)  # The two batches take turns, each with five parts of this many sequences.
    torch.testing.assert_close(first, oracle(model, text[0][:rows])[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(third, oracle(model, text[0][rows : 2 * rows])[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again, first)


def full(steps: int = 20, **options: Any) -> tuple[Net, CTROptimizer]:
    """Return a net and its optimizer, with a full budget and the gradient of the KL."""
    model = net(b_std=0.0)
    opt = optimizer(model, **{**FULL, "retain": TEXT, **options})
    train(model, opt, steps)
    assert opt._budget.state.budget_span is not None
    return model, opt


def test_the_step_taken_changes_the_kl_as_predicted_and_keeps_its_bound() -> None:
    model, opt = full()
    state, found = opt._budget.state, 0
    for step in range(20, 50):
        parameters = opt._budget.meter.parameters
        gradient = [opt.state[p][GRADIENT].clone() for p in parameters]
        before, ahead, measured = [p.detach().clone() for p in parameters], state.budget_ahead, opt._budget_due
        train(model, opt, 1, step)
        assert opt.metrics()["trust/predicted_kl"] <= FULL["max_kl"] * (1 + 1e-6)
        if not measured:
            change = sum(
                float((g * (p.detach() - b)).sum()) for g, p, b in zip(gradient, parameters, before, strict=True)
            )
            assert state.budget_ahead == pytest.approx(max(ahead + change, 0.0), rel=1e-6)
            found += 1
    assert found > 10


@pytest.mark.parametrize("limit", [3e-3, 0.02, 0.1])
@pytest.mark.parametrize("text", [True, False])
def test_a_full_budget_is_measured_rarely_and_kept(limit: float, text: bool) -> None:
    model = net(b_std=0.0)
    opt = optimizer(
        model, lr=0.05, max_kl=limit / 10, calibration_interval=4, kl_budget=limit, retain=TEXT if text else None
    )
    meter, counts, measured = opt._budget.meter, [], opt._budget.meter.measure
    meter.measure = lambda: counts.append(1) or measured()
    data = batch(0, n=16)
    for _ in range(120):
        opt.zero_grad()
        backward(model, data)
        opt.step()
        assert opt.metrics()["budget/used"] <= 1.02 * limit
    assert opt.metrics()["budget/used"] > 0.7 * limit
    before = len(counts)
    for _ in range(64):
        opt.zero_grad()
        backward(model, data)
        opt.step()
        assert opt.metrics()["budget/used"] <= 1.02 * limit
    assert len(counts) - before <= 64 * 0.6  # about two steps for each measurement


def test_a_run_with_a_gradient_goes_on_bit_for_bit() -> None:
    model, opt = full()
    again = net(b_std=0.0)
    resumed = optimizer(again, **FULL, retain=TEXT)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    twin = copy.deepcopy((model, opt))
    for one, its in ((model, opt), (again, resumed), twin):
        train(one, its, 20, 20)
    assert same(snapshot(again), snapshot(model)) and same(snapshot(twin[0]), snapshot(model))
    assert resumed._budget.state == opt._budget.state


def test_a_run_without_a_budget_drops_the_gradient() -> None:
    model, opt = full()
    plain = optimizer(model, lr=0.05, max_kl=3e-4, calibration_interval=4, retain=TEXT)
    plain.load_state_dict(opt.state_dict())
    assert not any(GRADIENT in entry for entry in plain.state.values())


def test_a_scaled_loss_changes_nothing() -> None:
    runs = []
    for scale in (1.0, 2.0**10):
        model = net(b_std=0.0)
        opt = optimizer(model, **FULL, retain=TEXT)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        for step in range(30):
            opt.zero_grad()
            ids, labels = batch(step)
            loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        assert opt._budget.state.budget_span is not None
        runs.append(snapshot(model))
    for name, expected in runs[0].items():
        torch.testing.assert_close(runs[1][name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("resize", ["physical", "masked"])
def test_a_rank_event_drops_the_gradient(resize: str) -> None:
    ranks = dict(interval=30, window=2, hysteresis=0.0, absent="sketch", budget=6, min_rank=1)
    model = net(b_std=0.0)
    opt = optimizer(model, **FULL, retain=TEXT, rank_scheduler=ranks, resize=resize)
    assert isinstance(opt._curvature, KFAC)
    train(model, opt, 29)
    assert any(GRADIENT in entry for entry in opt.state.values())
    train(model, opt, 1, 29)
    assert not any(GRADIENT in entry for entry in opt.state.values())
    train(model, opt, 10, 30)
    assert opt.metrics()["budget/used"] <= 1.02 * FULL["kl_budget"]


def test_a_model_without_a_second_backward_pass_trains_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextMeter, "gradient", lambda self, turn: None)
    model = net(b_std=0.0)
    opt = optimizer(model, **FULL, retain=TEXT)
    train(model, opt, 40)
    assert opt._budget.state.budget_span is None
    assert 0.8 < opt.metrics()["budget/used"] / FULL["kl_budget"] <= 1.02


def test_layers_that_freeze_and_thaw_keep_the_gradient() -> None:
    model, opt = full()
    for frozen in (True, False):
        model.up.requires_grad_(not frozen)
        model.up.base.requires_grad_(False)
        train(model, opt, 12, 20)
        assert opt._budget.state.budget_span is not None
        assert opt.metrics()["budget/used"] <= 1.02 * FULL["kl_budget"]


def test_a_layer_that_is_frozen_from_the_start() -> None:
    model = net(b_std=0.0)
    opt = optimizer(model, **FULL, retain=TEXT)
    train(model, opt, 2)
    model.up.lora_A.weight.requires_grad_(False)
    train(model, opt, 30, 2)
    assert opt._budget.state.budget_span is not None


def test_parameters_of_another_optimizer_get_no_state() -> None:
    model = net(b_std=0.0)
    mine = [p for name, p in model.named_parameters() if "lora_B" in name]
    opt = CTROptimizer(mine, model=model, kl_schedule="lr", **FULL, retain=TEXT)
    train(model, opt, 40)
    assert opt._budget.state.budget_turn > 0
    assert set(opt.state_dict()["state"]) == {0, 1} and set(opt.state) == set(mine)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """Reentrant checkpointing hides the parameters from autograd: there is no gradient, rather than one of zero."""
    model: Any = tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    opt = optimizer(model.train(), calibration_interval=4, kl_budget=10.0)
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad.clone() for p in opt._budget.meter.parameters]
    opt._budget.meter.measure()
    found = opt._budget.meter.gradient(0)
    assert found is None if reentrant else sum(g.norm() for g in found) > 0
    assert all(torch.equal(p.grad, g) for p, g in zip(opt._budget.meter.parameters, grads, strict=True))


def test_a_batch_of_padding_adds_nothing() -> None:
    model: Any = tiny_llama()
    ids = torch.randint(3, 64, (20, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[16:] = 0  # the last part of the batch for a gradient, as in a batch that is filled up
    padding = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    pairs = optimizer(model).pairs
    found = []
    for text in ([{"input_ids": ids, "attention_mask": mask}, padding], [{"input_ids": ids[:16]}]):
        meter = TextMeter(model, lambda _, text=text: text, pairs)
        found.append((meter.measure(), meter.gradient(0)))
    (one, first), (two, second) = found
    assert one == pytest.approx(two, rel=1e-3) and one > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def together(rank: int, folder: Path, kind: str) -> Any:
    """Return this process's gradient, and its weights after a run with a full budget."""
    model: Any = tiny_llama()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(0.1)
    texts = [torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    mine = texts if kind == "one" else texts[rank::2]
    if kind == "fsdp":
        from test_processes import shard

        model = shard(model)
    elif kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    limit = 10.0 if kind == "one" else 0.02
    opt = optimizer(model, lr=0.05, max_kl=2e-3, calibration_interval=4, retain=mine, kl_budget=limit)
    found = opt._budget.meter.gradient(0)
    if kind == "one":
        return found, None, None
    for step in range(12):
        ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(50 + 2 * step + rank))
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        opt.zero_grad()
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach() for pair in opt.pairs for p in (pair.A, pair.B)]
    return found, weights, opt._budget.state


@needs_gloo
@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=needs_fsdp2)])
def test_two_processes_agree(tmp_path: Path, kind: str) -> None:
    expected, _, _ = together(0, tmp_path, "one")
    (one, weights, state), (two, others, theirs) = spawn(together, tmp_path, kind)
    assert state == theirs and all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    if kind == "fsdp":
        assert one is None and two is None and state.budget_span is None
        return
    assert state.budget_span is not None
    for a, b, e in zip(one, two, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-10)
