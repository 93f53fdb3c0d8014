"""No step exceeds its bound, between measurements and in whole runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    backward,
    batch,
    factors_of,
    kl_of_step,
    loss_of,
    net,
    optimizer,
    snapshot,
    train,
    trainable,
    weights_of,
)
from torch import Tensor

from ctr_optim.curvature.factors import STRUCTURES
from ctr_optim.trust_region.coupling import SLOPE_EXPONENT, alignment

# -- from one step to the next -----------------------------------------------------------------------------------------


@given(slope=st.floats(-10, 10), q=st.floats(1e-3, 1e3), typical=st.floats(1e-3, 1e3), scale=st.floats(0.1, 10.0))
def test_alignment_puts_the_slope_into_the_form(slope: float, q: float, typical: float, scale: float) -> None:
    s, form = (torch.tensor(x, dtype=torch.float64) for x in (slope, q))
    got = float(alignment(s, form, typical))
    assert got == pytest.approx(min(max(slope**2 / (q * typical), 1 / 3), 9.0) ** SLOPE_EXPONENT)
    # The prediction is quadratic in the step's length for every exponent.
    assert float(alignment(scale * s, scale**2 * form, typical)) == pytest.approx(got)


def test_alignment_of_a_step_that_goes_nowhere() -> None:
    assert float(alignment(torch.tensor(0.0), torch.tensor(0.0), 1.0)) == pytest.approx(3**-SLOPE_EXPONENT)


@pytest.mark.parametrize("maximize", [False, True])
def test_between_measurements_the_coupling_follows_the_slope(maximize: bool) -> None:
    """The slope is that of the applied step, momentum and weight decay included, relative to the loss scale."""
    model = net()
    opt = optimizer(
        model, lr=0.1, weight_decay=0.1, max_kl=1e-4, calibration_interval=50, factor_interval=1, maximize=maximize
    )
    typical = coupling = average = None
    for step in range(3, 8):  # Only the first of these steps is measured.
        opt.zero_grad()
        data = batch(step)
        with torch.no_grad():
            logits = model(data[0])
        (gradient,) = torch.autograd.grad(loss_of(logits.requires_grad_(), data[1]), logits)
        scale = int((data[1] != -100).sum()) * float(gradient.square().sum())
        backward(model, data)
        before, weights = snapshot(model), weights_of(opt)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        opt.step()
        found = opt.metrics()
        moved = snapshot(model)
        slope = sum(float((g * (moved[name] - before[name])).sum()) for name, g in grads.items())
        assert slope * (1 if maximize else -1) > 0
        now = opt.state_dict()["param_groups"][0]["ctr"]["loss_scale"]
        ratio = slope**2 / scale * now / (2 * kl_of_step(factors_of(opt), weights, weights_of(opt)))
        if typical is None or coupling is None or average is None:
            typical, coupling, average = ratio, found["trust/coupling"], now
        expected = coupling * average / now * min(max(ratio / typical, 1 / 3), 9) ** SLOPE_EXPONENT
        assert found["trust/coupling"] == pytest.approx(expected, rel=1e-4)
        saved = opt.state_dict()
        saved["param_groups"][0]["ctr"] |= {"steps": 101, "watched": 0}  # No measurement is due.
        opt.load_state_dict(saved)


@pytest.mark.parametrize("max_kl", [1e-4, None])
def test_momentum_alone_is_not_stretched_to_the_bound(max_kl: float | None) -> None:
    """A batch of samples whose rewards all agree has a loss without a gradient."""
    model = net()
    opt = optimizer(model, lr=0.1, max_kl=max_kl)
    train(model, opt, 3)
    for _ in range(2):
        before = snapshot(model)
        opt.zero_grad()
        backward(model, batch(3), weight=0.0)
        opt.step()
        moved = any(not torch.equal(before[name], value) for name, value in snapshot(model).items())
        assert moved == (max_kl is None)
    if max_kl is None:
        return
    assert opt.metrics()["trust/scale"] == opt.metrics()["trust/predicted_kl"] == 0
    train(model, opt, 1)
    assert 0 < opt.metrics()["trust/predicted_kl"] <= max_kl * (1 + 1e-5)


# -- the bound in whole runs -------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    lr=st.floats(-4, 0).map(lambda x: 10**x),
    max_kl=st.floats(-5, -1).map(lambda x: 10**x),
    beta=st.sampled_from([0.0, 0.9, 0.99]),
    weight_decay=st.sampled_from([0.0, 0.1, 1.0]),
    penalty=st.sampled_from([0.0, 1e-2, 1.0]),
    structure=st.sampled_from(list(STRUCTURES)),
    schedule=st.sampled_from(["lr", "constant"]),
    calibration=st.sampled_from([None, 2]),
    free_head=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_step_ever_leaves_the_trust_region(
    lr: float, max_kl: float, beta: float, weight_decay: float, penalty: float, structure: str, schedule: str,
    calibration: int | None, free_head: bool, seed: int,
) -> None:  # fmt: skip
    """The predicted KL of the applied change is within the bound, with momentum, weight decay and penalty."""
    model = net(seed)
    model.head.requires_grad_(free_head)
    opt = optimizer(
        model, lr=lr, betas=(beta, 0.99), weight_decay=weight_decay, trust_penalty=penalty, max_kl=max_kl,
        kl_schedule=schedule, factor_structure=structure, calibration_interval=calibration, factor_interval=2,
    )  # fmt: skip
    heads = list(model.head.parameters()) if free_head else []
    for step in range(6):
        before, heads_before = weights_of(opt), [p.detach().clone() for p in heads]
        train(model, opt, 1, seed + step)
        found = opt.metrics()
        tokens = float((batch(seed + step)[1] != -100).sum())  # the same in every batch
        form = kl_of_step(factors_of(opt), before, weights_of(opt))
        # The heads have no factors; they count by Adam's second moments times N tokens.
        for p, b in zip(heads, heads_before, strict=True):
            state = opt.state[p]
            second = torch.maximum(state["exp_avg_sq"] / (1 - 0.99 ** state["step"]), p.grad.square())
            form += 0.5 * tokens * float((second * (p.detach() - b).square()).sum())
        predicted = found["trust/coupling"] * form
        assert predicted <= max_kl * (1 + 1e-4)
        assert predicted == pytest.approx(found["trust/predicted_kl"], rel=1e-4, abs=1e-12)
        assert found["trust/max_kl"] == pytest.approx(max_kl)
        assert 0 < found["trust/scale"] <= 1
        if found["trust/scale"] < 1:
            assert predicted == pytest.approx(max_kl, rel=1e-4)


def test_parameters_outside_the_pairs_are_scaled_with_the_rest() -> None:
    steps = []
    for max_kl in (None, 1e-5):
        model = net()
        model.head.requires_grad_(True)
        opt = optimizer(model, lr=0.1, max_kl=max_kl)
        before = [p.detach().clone() for p in trainable(model)]
        train(model, opt, 1)
        steps.append([p.detach() - q for p, q in zip(trainable(model), before, strict=True)])
        scale = opt.metrics()["trust/scale"]
    assert 0 < scale < 0.5
    for free, held in zip(*steps, strict=True):
        torch.testing.assert_close(held, scale * free)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_inactive_constraint_changes_no_bit(structure: str, dtype: torch.dtype) -> None:
    runs = []
    for max_kl in (None, 1e6):
        model = net(dtype=dtype)
        opt = optimizer(
            model, lr=1e-2, weight_decay=0.1, max_kl=max_kl, factor_structure=structure, kl_schedule="constant"
        )
        train(model, opt, 5)
        runs.append(model.state_dict())
        assert opt.metrics()["trust/scale"] == 1.0
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


@pytest.mark.parametrize("calibration", [None, 2])
@pytest.mark.parametrize("schedule", ["lr", "constant"])
def test_above_the_threshold_the_learning_rate_does_not_matter(schedule: str, calibration: int | None) -> None:
    runs = []
    for lr in (1.0, 4.0, 100.0):
        model = net()
        opt = optimizer(model, lr=lr, max_kl=1e-3, kl_schedule=schedule, calibration_interval=calibration)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 - t / 10)
        for step in range(6):
            train(model, opt, 1, step)
            scheduler.step()
            assert opt.metrics()["trust/scale"] < 1
        runs.append([p.detach() for p in trainable(model)])
    for other in runs[1:]:
        for p, q in zip(runs[0], other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule, power", [("lr", 2), ("constant", 0)])
def test_the_bound_follows_the_schedule(schedule: str, power: int) -> None:
    model = net()
    opt = optimizer(model, lr=0.5, max_kl=1e-3, kl_schedule=schedule)
    shape = [0.0, 0.5, 1.0, 0.75, 0.25, 0.1]  # warm-up and decay
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: shape[min(t, 5)])
    for step, share in enumerate(shape):
        train(model, opt, 1, step)
        scheduler.step()
        assert opt.metrics()["trust/max_kl"] == pytest.approx(1e-3 * share**power)


def test_the_peak_learning_rate_is_the_largest_seen() -> None:
    model = net()
    opt = optimizer(model, lr=0.1, max_kl=1e-3)
    for step, (lr, expected) in enumerate([(0.1, 1.0), (0.4, 1.0), (0.2, 0.25)]):
        opt.param_groups[0]["lr"] = lr
        train(model, opt, 1, step)
        assert opt.metrics()["trust/max_kl"] == pytest.approx(1e-3 * expected)


@pytest.mark.parametrize(
    "lr, max_kl, maximize", [(1e-3, 1e-3, False), (1e-3, 1e-3, True), (100.0, 3e3, False), (0.5, 2.0, False)]
)
def test_the_adaptive_bound_compares_promise_and_fact(lr: float, max_kl: float, maximize: bool) -> None:
    model, (ids, labels) = net(), batch()
    opt = optimizer(model, lr=lr, max_kl=max_kl, kl_schedule="adaptive", maximize=maximize)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model(ids), labels)
        loss.backward()
        return loss

    before = closure().detach()
    grads = [p.grad.clone() for p in trainable(model)]
    start = [p.detach().clone() for p in trainable(model)]
    opt.step(closure)
    with torch.no_grad():
        after = loss_of(model(ids), labels)
    moved = [p.detach() - q for p, q in zip(trainable(model), start, strict=True)]
    sign = -1 if maximize else 1
    promised = -sign * sum(float((g * m).sum()) for g, m in zip(grads, moved, strict=True))
    promised -= opt.metrics()["trust/predicted_kl"]
    ratio = sign * float(before - after) / promised if promised > 0 else 0.0
    expected = 1.5 if ratio > 0.75 else 0.5 if ratio < 0.25 else 1.0
    for g, p in zip(grads, trainable(model), strict=True):
        assert p.grad is not None and p.grad.shape == g.shape
    opt.step(closure)
    assert opt.metrics()["trust/max_kl"] == pytest.approx(max_kl * expected)


def test_without_a_bound_there_is_nothing_to_adapt() -> None:
    model, (ids, labels), calls = net(), batch(), []
    opt = optimizer(model, lr=1e-2, max_kl=None, kl_schedule="adaptive")

    def closure() -> Tensor:
        calls.append(1)
        opt.zero_grad()
        loss = loss_of(model(ids), labels)
        loss.backward()
        return loss

    opt.step(closure)
    assert len(calls) == 1 and opt.metrics()["trust/max_kl"] is None


def test_both_branches_of_the_adaptive_bound_are_reached() -> None:
    bounds = {}
    for lr, max_kl in ((1e-3, 1e-3), (100.0, 3e3)):
        model, (ids, labels) = net(), batch()
        opt = optimizer(model, lr=lr, max_kl=max_kl, kl_schedule="adaptive")

        def closure(model: Any = model, opt: Any = opt, ids: Tensor = ids, labels: Tensor = labels) -> Tensor:
            opt.zero_grad()
            loss = loss_of(model(ids), labels)
            loss.backward()
            return loss

        for _ in range(2):
            opt.step(closure)
        bounds[lr] = opt.metrics()["trust/max_kl"] / max_kl
    assert bounds == {1e-3: pytest.approx(1.5), 100.0: pytest.approx(0.5)}
