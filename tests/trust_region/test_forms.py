"""The quadratic form, the scale of a step, and the penalty on the KL from the base model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    backward,
    batch,
    factors_of,
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
from ctr_optim.trust_region.region import scale_within

R, D_IN, D_OUT, LAYERS = 3, 6, 5, 2


def spd(*shape: int) -> Tensor:
    x = torch.randn(*shape, shape[-1], dtype=torch.float64)
    return x @ x.mT / shape[-1]


def root(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def layers(seed: int) -> dict[str, Any]:
    """Return random layers whose H and D are consistent with C and S."""
    torch.manual_seed(seed)
    C, S = spd(LAYERS, D_IN), spd(LAYERS, D_OUT)
    a, b = torch.randn(LAYERS, R, D_IN, dtype=torch.float64), torch.randn(LAYERS, D_OUT, R, dtype=torch.float64)
    return dict(a=a, b=b, H=a @ C @ a.mT, D=b.mT @ S @ b, C=Dense(C), S=Dense(S))


def change_of_product(d: dict[str, Any], da: Tensor, db: Tensor) -> Tensor:
    """Return ``|S^1/2 (B dA + dB A) C^1/2|^2`` per layer: the first-order change of BA in the K-FAC metric."""
    change = d["b"] @ da + db @ d["a"]
    return (root(d["S"].to_dense()) @ change @ root(d["C"].to_dense())).square().sum((-2, -1))


# -- the quadratic form ------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_quadratic_is_the_kronecker_form_of_the_change_of_the_product(seed: int, scale: float) -> None:
    d = layers(seed)
    da, db = torch.randn_like(d["a"]) * scale, torch.randn_like(d["b"])
    torch.testing.assert_close(quadratic(da, db, **d), change_of_product(d, da, db), rtol=1e-9, atol=0)
    torch.testing.assert_close(quadratic(da, None, **d), change_of_product(d, da, 0 * db), rtol=1e-9, atol=0)
    torch.testing.assert_close(quadratic(None, db, **d), change_of_product(d, 0 * da, db), rtol=1e-9, atol=0)
    assert torch.equal(quadratic(None, None, **d), torch.zeros(LAYERS, dtype=torch.float64))


def test_quadratic_vanishes_where_the_product_does_not_change() -> None:
    """``A <- T A, B <- B T^-1`` changes BA only at second order, so the cross term cancels the squares."""
    d = layers(0)
    X = torch.randn(LAYERS, R, R, dtype=torch.float64)
    still = quadratic(X @ d["a"], -d["b"] @ X, **d)
    alone = quadratic(X @ d["a"], None, **d)
    assert (still.abs() < 1e-10 * alone).all() and (alone > 0).all()


@given(seed=st.integers(0, 10_000), name=st.sampled_from(list(STRUCTURES)), lie=st.floats(0.0, 10.0))
def test_quadratic_is_never_negative_and_homogeneous(seed: int, name: str, lie: float) -> None:
    """This also holds if H and D contradict the estimates C and S."""
    d = layers(seed)
    structure = STRUCTURES[name]
    for key, width in (("C", D_IN), ("S", D_OUT)):
        d[key] = structure(*structure.sums(lie * torch.randn(LAYERS, 4, width, dtype=torch.float64), torch.float64))
    da, db = torch.randn_like(d["a"]), torch.randn_like(d["b"])
    q = quadratic(da, db, **d)
    assert (q >= 0).all() and q.isfinite().all()
    torch.testing.assert_close(quadratic(3 * da, 3 * db, **d), 9 * q, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(quadratic(-da, -db, **d), q, rtol=1e-9, atol=1e-12)


# -- the scale ---------------------------------------------------------------------------------------------------------


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


# -- the penalty -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000))
def test_penalty_gradients_are_those_of_the_fisher_norm_of_the_adapter(seed: int) -> None:
    d = layers(seed)
    a, b = d["a"].clone().requires_grad_(), d["b"].clone().requires_grad_()
    value = (root(d["S"].to_dense()) @ b @ a @ root(d["C"].to_dense())).square().sum()
    torch.testing.assert_close(value, (d["D"] * d["H"].mT).sum())  # tr(D H)
    expected = torch.autograd.grad(value, (a, b))
    for got, want in zip(penalty_gradients(**d), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_penalty_is_part_of_what_is_minimized(structure: str, reduction: str) -> None:
    """The step is Adam's on the gradient of ``L + lambda (tr(D A C A^T) + tr(B^T S B H)) / 2`` with fixed D and H."""
    weight, ends, start, tokens = 0.3, [], net(), 16 if reduction == "sum" else 1
    for penalty in (0.0, weight):
        model = net()
        # With these options, Adam's step is almost the gradient.
        options = dict(lr=1e-2, betas=(0.0, 0.0), eps=1e3, max_kl=None)
        opt = optimizer(model, trust_penalty=penalty, factor_structure=structure, loss_reduction=reduction, **options)
        backward(model, batch(0), reduction)
        opt.step()
        ends.append(weights_of(opt))
    for name, f in factors_of(opt).items():
        layer = start.get_submodule(name)
        a, b = (copy.deepcopy(w).requires_grad_() for w in (layer.lora_A.weight, layer.lora_B.weight))
        gradients = (
            0.5 * torch.autograd.grad(torch.trace(f["D"] @ a @ f["C"] @ a.mT), a)[0],
            0.5 * torch.autograd.grad(torch.trace(b.mT @ f["S"] @ b @ f["H"]), b)[0],
        )
        for without, with_it, gradient in zip(ends[0][name], ends[1][name], gradients, strict=True):
            torch.testing.assert_close(1e5 * (without - with_it), tokens * weight * gradient, rtol=0.05, atol=1e-4)


def test_the_penalty_pulls_towards_the_base_model() -> None:
    distance = []
    for penalty in (0.0, 3.0):
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
    """The layer counts by its gradients until the hooks collect its factors."""

    def tenth_step(joins: bool) -> tuple[bool, dict[str, Any]]:
        """Return whether the late layer changed in the tenth step, and the metrics of that step."""
        model, rare = net(), net(seed=1)
        opt = CTROptimizer(
            [*trainable(model), *trainable(rare)], lr=0.05, max_kl=1e-5, factor_interval=8, calibration_interval=None
        )
        start = snapshot(rare)
        for late in (*[False] * 9, joins):
            assert same(start, snapshot(rare))
            opt.zero_grad()
            backward(model, batch(opt.steps))
            if late or zeros:
                backward(rare, batch(opt.steps), weight=float(late))
            opt.step()
        return not same(start, snapshot(rare)), opt.metrics()

    (stays, without), (moves, metrics) = tenth_step(False), tenth_step(True)
    assert moves and not stays and metrics["trust/max_kl"] == without["trust/max_kl"]
    # Adam's second moments also average zeros: one gradient after nine zeros counts a tenth.
    assert metrics["trust/scale"] < (0.95 if zeros else 0.9) * without["trust/scale"]
    assert metrics["trust/predicted_kl"] <= metrics["trust/max_kl"] * (1 + 1e-6)


def test_a_layer_that_is_never_seen_need_not_wait() -> None:
    """Fused kernels may use A and B without calling them as modules; the layer trains as with Adam."""
    model = net()
    up = model.up
    up.forward = lambda x: up.base(x) + up.scaling * x @ up.lora_A.weight.mT @ up.lora_B.weight.mT
    opt = optimizer(model, lr=0.05, max_kl=1e-3, factor_interval=8)
    train(model, opt, 3)
    before = snapshot(model)
    train(model, opt, 1, start=3)  # In this step the hooks collect no statistics.
    assert not any(torch.equal(before[f"up.lora_{half}.weight"], getattr(up, f"lora_{half}").weight) for half in "AB")
    opt.close()
    train(model, opt, 1)
    assert opt.steps == 5
