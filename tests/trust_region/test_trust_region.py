"""The trust region: its metric, the bound that every step keeps, the schedules of the bound, the penalty."""

from __future__ import annotations

import copy
import math
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
    same,
    snapshot,
    train,
    trainable,
    weights_of,
)
from torch import Tensor

from ctr_optim import CTROptimizer
from ctr_optim.curvature.factors import STRUCTURES, Dense
from ctr_optim.curvature.forms import penalty_gradients, quadratic
from ctr_optim.trust_region.bound import adapted_bound
from ctr_optim.trust_region.coupling import SLOPE_EXPONENT, alignment
from ctr_optim.trust_region.region import scale_within

R, D_IN, D_OUT, LAYERS = 3, 6, 5, 2


def spd(*shape: int) -> Tensor:
    x = torch.randn(*shape, shape[-1], dtype=torch.float64)
    return x @ x.mT / shape[-1]


def root(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def layers(seed: int) -> dict[str, Any]:
    """Random layers whose H and D are those of C and S."""
    torch.manual_seed(seed)
    C, S = spd(LAYERS, D_IN), spd(LAYERS, D_OUT)
    a, b = torch.randn(LAYERS, R, D_IN, dtype=torch.float64), torch.randn(LAYERS, D_OUT, R, dtype=torch.float64)
    return dict(a=a, b=b, H=a @ C @ a.mT, D=b.mT @ S @ b, C=Dense(C), S=Dense(S))


def change_of_product(d: dict[str, Any], da: Tensor, db: Tensor) -> Tensor:
    """``|S^1/2 (B dA + dB A) C^1/2|^2`` layer by layer: the first-order change of BA in the K-FAC metric."""
    change = d["b"] @ da + db @ d["a"]
    return (root(d["S"].to_dense()) @ change @ root(d["C"].to_dense())).square().sum((-2, -1))


# -- the quadratic form -----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_quadratic_is_the_kronecker_form_of_the_change_of_the_product(seed: int, scale: float) -> None:
    d = layers(seed)
    da, db = torch.randn_like(d["a"]) * scale, torch.randn_like(d["b"])
    torch.testing.assert_close(quadratic(da, db, **d), change_of_product(d, da, db), rtol=1e-9, atol=0)
    torch.testing.assert_close(quadratic(da, None, **d), change_of_product(d, da, 0 * db), rtol=1e-9, atol=0)
    torch.testing.assert_close(quadratic(None, db, **d), change_of_product(d, 0 * da, db), rtol=1e-9, atol=0)
    assert torch.equal(quadratic(None, None, **d), torch.zeros(LAYERS, dtype=torch.float64))


def test_quadratic_vanishes_where_the_product_does_not_change() -> None:
    """``A <- T A, B <- B T^-1`` moves nothing, to first order: the cross term cancels the squares."""
    d = layers(0)
    X = torch.randn(LAYERS, R, R, dtype=torch.float64)
    still = quadratic(X @ d["a"], -d["b"] @ X, **d)
    alone = quadratic(X @ d["a"], None, **d)
    assert (still.abs() < 1e-10 * alone).all() and (alone > 0).all()


@given(seed=st.integers(0, 10_000), name=st.sampled_from(list(STRUCTURES)), lie=st.floats(0.0, 10.0))
def test_quadratic_is_never_negative_and_homogeneous(seed: int, name: str, lie: float) -> None:
    """Also where C and S are estimates that H and D contradict."""
    d = layers(seed)
    structure = STRUCTURES[name]
    for key, width in (("C", D_IN), ("S", D_OUT)):
        d[key] = structure(*structure.sums(lie * torch.randn(LAYERS, 4, width, dtype=torch.float64), torch.float64))
    da, db = torch.randn_like(d["a"]), torch.randn_like(d["b"])
    q = quadratic(da, db, **d)
    assert (q >= 0).all() and q.isfinite().all()
    torch.testing.assert_close(quadratic(3 * da, 3 * db, **d), 9 * q, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(quadratic(-da, -db, **d), q, rtol=1e-9, atol=1e-12)


# -- from one step to the next ----------------------------------------------------------------------------------------


@given(slope=st.floats(-10, 10), q=st.floats(1e-3, 1e3), typical=st.floats(1e-3, 1e3), scale=st.floats(0.1, 10.0))
def test_alignment_puts_the_slope_into_the_form(slope: float, q: float, typical: float, scale: float) -> None:
    s, form = (torch.tensor(x, dtype=torch.float64) for x in (slope, q))
    got = float(alignment(s, form, typical))
    assert got == pytest.approx(min(max(slope**2 / (q * typical), 1 / 9), 9.0) ** SLOPE_EXPONENT)
    # the prediction stays quadratic in the step's length, whatever the exponent
    assert float(alignment(scale * s, scale**2 * form, typical)) == pytest.approx(got)


def test_alignment_of_a_step_that_goes_nowhere() -> None:
    assert float(alignment(torch.tensor(0.0), torch.tensor(0.0), 1.0)) == pytest.approx(9**-SLOPE_EXPONENT)


@pytest.mark.parametrize("maximize", [False, True])
def test_between_measurements_the_coupling_follows_the_slope(maximize: bool) -> None:
    """Momentum, decay: the slope is that of the step that the parameters really take."""
    model = net()
    opt = optimizer(
        model, lr=0.1, weight_decay=0.1, max_kl=1e-4, calibration_interval=50, factor_interval=1, maximize=maximize
    )
    typical = coupling = None
    for step in range(3, 8):  # measured at the first of these only
        opt.zero_grad()
        backward(model, batch(step))
        before, weights = snapshot(model), weights_of(opt)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        opt.step()
        found = opt.metrics()
        moved = snapshot(model)
        slope = sum(float((g * (moved[name] - before[name])).sum()) for name, g in grads.items())
        assert slope * (1 if maximize else -1) > 0
        ratio = slope**2 / (2 * kl_of_step(factors_of(opt), weights, weights_of(opt)))
        if typical is None or coupling is None:
            typical, coupling = ratio, found["trust/coupling"]
        expected = coupling * min(max(ratio / typical, 1 / 9), 9) ** SLOPE_EXPONENT
        assert found["trust/coupling"] == pytest.approx(expected, rel=1e-4)
        opt._counters.steps = 101  # no measurement is due
        opt._arm()


# -- the scale --------------------------------------------------------------------------------------------------------


@given(predicted=st.floats(0, 1e30), bound=st.floats(1e-12, 1e3))
def test_scale_brings_the_prediction_within_the_bound(predicted: float, bound: float) -> None:
    scale = float(scale_within(torch.tensor(predicted, dtype=torch.float64), bound))
    assert 0 <= scale <= 1
    if predicted <= bound:
        assert scale == 1.0
    else:
        assert predicted * scale**2 == pytest.approx(bound, rel=1e-9)


def test_scale_is_zero_for_a_bound_of_zero() -> None:
    assert float(scale_within(torch.tensor(1.0), 0.0)) == 0.0
    assert float(scale_within(torch.tensor(0.0), 0.0)) == 1.0


@pytest.mark.parametrize(
    "actual, predicted, factor",
    [(1.0, 1.0, 1.5), (0.8, 1.0, 1.5), (0.5, 1.0, 1.0), (0.25, 1.0, 1.0), (0.2, 1.0, 0.5), (-1.0, 1.0, 0.5),
     (1.0, -1.0, 0.5), (math.nan, 1.0, 0.5), (5.0, 1.0, 1.5)],
)  # fmt: skip
def test_the_rule_of_the_adaptive_bound(actual: float, predicted: float, factor: float) -> None:
    assert adapted_bound(0.01, 0.01, actual, predicted) == pytest.approx(0.01 * factor)


def test_the_adaptive_bound_stays_in_range() -> None:
    up = down = 0.01
    for _ in range(50):
        up, down = adapted_bound(up, 0.01, 1.0, 1.0), adapted_bound(down, 0.01, -1.0, 1.0)
    assert up == pytest.approx(1.0) and down == pytest.approx(1e-4)


# -- the constraint on whole runs -------------------------------------------------------------------------------------


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
    """Momentum, decay, penalty and all: the KL predicted for what the parameters really did is within the bound."""
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
        tokens = float((batch(seed + step)[1] != -100).sum())  # every batch has as many
        form = kl_of_step(factors_of(opt), before, weights_of(opt))
        for p, b in zip(heads, heads_before, strict=True):  # no factors: Adam's second moments over N tokens
            state = opt.state[p]
            second = state["exp_avg_sq"] / (1 - 0.99 ** state["step"])
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


# -- the penalty ------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000))
def test_penalty_gradients_are_those_of_the_fisher_norm_of_the_adapter(seed: int) -> None:
    d = layers(seed)
    a, b = d["a"].clone().requires_grad_(), d["b"].clone().requires_grad_()
    value = (root(d["S"].to_dense()) @ b @ a @ root(d["C"].to_dense())).square().sum()
    torch.testing.assert_close(value, (d["D"] * d["H"].mT).sum())  # tr(D H)
    expected = torch.autograd.grad(value, (a, b))
    for got, want in zip(penalty_gradients(**d), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_penalty_is_applied_decoupled(structure: str) -> None:
    """One step with it and one without differ by lr * lambda * the gradient of ``tr(D A C A^T) + tr(B^T S B H)``."""
    lr, weight, ends, start = 1e-2, 0.3, [], net()
    for penalty in (0.0, weight):
        model = net()
        opt = optimizer(model, lr=lr, trust_penalty=penalty, max_kl=None, factor_structure=structure)
        train(model, opt, 1)
        ends.append(weights_of(opt))
    for name, f in factors_of(opt).items():
        layer = start.get_submodule(name)
        a, b = (copy.deepcopy(w).requires_grad_() for w in (layer.lora_A.weight, layer.lora_B.weight))
        gradients = (
            torch.autograd.grad(torch.trace(f["D"] @ a @ f["C"] @ a.mT), a)[0],
            torch.autograd.grad(torch.trace(b.mT @ f["S"] @ b @ f["H"]), b)[0],
        )
        for without, with_it, gradient in zip(ends[0][name], ends[1][name], gradients, strict=True):
            torch.testing.assert_close(without - with_it, lr * weight * gradient, rtol=1e-6, atol=1e-12)


def test_the_penalty_pulls_towards_the_base_model() -> None:
    distance = []
    for penalty in (0.0, 100.0):
        model = net()
        opt = optimizer(model, lr=1e-2, trust_penalty=penalty, max_kl=None)
        train(model, opt, 30)
        distance.append(opt.metrics()["kl_from_base"])
    assert distance[1] < 0.7 * distance[0]


def test_kl_from_base_is_half_the_trace_of_the_factors() -> None:
    model = net()
    opt = optimizer(model, lr=1e-3)
    train(model, opt, 2)
    found = opt.metrics()
    expected = {n: 0.5 * float(torch.trace(f["D"] @ f["H"])) for n, f in factors_of(opt).items()}
    assert found["kl_from_base/layer"] == pytest.approx(expected)
    assert found["kl_from_base"] == pytest.approx(sum(expected.values()))
    backward(model, batch(3))
    assert opt.metrics()["ranks"] == {"up": 3, "down": 3}


@pytest.mark.parametrize("zeros", [False, True], ids=["frozen", "gradient-zero"])
def test_a_layer_that_starts_late_counts_from_its_first_step(zeros: bool) -> None:
    """Its gradients bound it until the taps are open; from then on its factors do."""
    model, rare = net(), net(seed=1)
    opt = CTROptimizer(
        [*trainable(model), *trainable(rare)], lr=0.05, max_kl=1e-5, factor_interval=8, calibration_interval=None
    )
    start = snapshot(rare)

    def step(both: bool) -> None:
        opt.zero_grad()
        backward(model, batch(opt.steps))
        if both or zeros:
            backward(rare, batch(opt.steps), weight=float(both))
        opt.step()

    for _ in range(9):
        step(both=False)
    assert same(start, snapshot(rare))
    alone = opt.metrics()["trust/scale"]
    step(both=True)
    assert not same(start, snapshot(rare))
    assert opt.metrics()["trust/scale"] < (1.1 if zeros else 0.9) * alone and opt.metrics()[
        "trust/predicted_kl"
    ] <= 1e-5 * (1 + 1e-6)


def test_a_layer_that_is_never_seen_need_not_wait() -> None:
    """Kernels may read the weights without calling the halves as modules; the layer trains as under Adam."""
    model = net()
    up = model.up
    up.forward = lambda x: up.base(x) + up.scaling * x @ up.lora_A.weight.mT @ up.lora_B.weight.mT
    opt = optimizer(model, lr=0.05, max_kl=1e-3, factor_interval=8)
    train(model, opt, 3)
    before = snapshot(model)
    train(model, opt, 1, start=3)  # a step in which the taps are closed
    assert not any(torch.equal(before[f"up.lora_{half}.weight"], getattr(up, f"lora_{half}").weight) for half in "AB")
    opt.close()
    train(model, opt, 1)
    assert opt.steps == 5
