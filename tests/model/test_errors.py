"""Errors for invalid arguments and for unusable gradients."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from support import backward, batch, factors_of, net, optimizer, same, snapshot, train, trainable
from torch import nn

from ctr_optim import CTROptimizer

NUMBERS = ["lr", "eps", "weight_decay", "max_kl", "trust_penalty", "factor_decay", "damping"]
COUNTS = ["calibration_interval", "factor_interval", "basis_interval", "max_tokens"]
CHOICES = ["kl_schedule", "curvature", "factor_structure", "resize", "loss_reduction"]

BAD: list[tuple[str, Any, type[Exception]]] = [
    *((name, value, ValueError) for name in NUMBERS for value in (-1.0, math.nan, math.inf)),
    *((name, value, TypeError) for name in NUMBERS for value in ("1e-3", True, [1.0])),
    *((name, None, TypeError) for name in NUMBERS if name not in ("max_kl", "lr")),
    ("max_kl", 0.0, ValueError),
    ("damping", 0.0, ValueError),
    ("factor_decay", 1.0, ValueError),
    *((name, value, ValueError) for name in COUNTS for value in (0, -3)),
    *((name, value, TypeError) for name in COUNTS for value in (2.0, "5", True)),
    *((name, None, TypeError) for name in ("factor_interval", "basis_interval")),
    *((name, value, ValueError) for name in CHOICES for value in ("no such thing", None)),
    ("betas", (0.9,), ValueError),
    ("betas", 0.9, ValueError),
    ("betas", (1.0, 0.9), ValueError),
    ("betas", (0.9, -0.1), ValueError),
    ("betas", (0.9, math.nan), ValueError),
    ("betas", ("a", 0.9), TypeError),
]


@pytest.mark.parametrize("name, value, error", BAD, ids=lambda x: str(x) if not isinstance(x, type) else x.__name__)
def test_a_bad_argument_is_named(name: str, value: Any, error: type[Exception]) -> None:
    model = net()
    with pytest.raises(error, match=rf"^{name}\b.*expected"):
        CTROptimizer(trainable(model), model=model, **{name: value})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "betas"])
def test_a_bad_argument_of_a_group_is_named(name: str) -> None:
    model = net()
    good, bad = {"params": trainable(model.up)}, {"params": trainable(model.down), name: -1.0}
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        CTROptimizer([good, bad], model=model)
    opt = CTROptimizer([good], model=model)
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        opt.add_param_group(bad)


@pytest.mark.parametrize(
    "options",
    [dict(max_kl=None), dict(max_kl=1), dict(calibration_interval=None), dict(max_tokens=None), dict(lr=0.0),
     dict(lr=torch.tensor(0.1)), dict(betas=[0.9, 0.99]), dict(weight_decay=0), dict(factor_decay=0.0), dict(eps=0.0)],
    ids=str,
)  # fmt: skip
def test_the_edges_of_what_is_allowed_train(options: dict[str, Any]) -> None:
    model = net()
    opt = CTROptimizer(trainable(model), model=model, **options)
    before = snapshot(model)
    train(model, opt, 3)
    assert all(p.isfinite().all() for p in model.parameters())
    assert same(before, snapshot(model)) == (options.get("lr") == 0.0)


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        CTROptimizer([])


def test_steps_without_gradients_do_nothing() -> None:
    model = net()
    opt = optimizer(model, lr=0.1, weight_decay=0.5)
    before = snapshot(model)
    opt.step()
    assert opt.step(lambda: 3.0) == 3.0
    assert same(before, snapshot(model))


def test_the_closure_is_called_once_with_gradients_on() -> None:
    model, calls = net(), []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        return backward(model, batch())

    opt = optimizer(model)
    assert torch.is_tensor(opt.step(closure)) and calls == [True]


# -- gradients --------------------------------------------------------------------------------------------------------


def test_a_sparse_gradient() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = CTROptimizer(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(TypeError, match=r"sparse gradient of shape \(5, 3\)"):
        opt.step()
    assert torch.equal(table.weight, before)


def test_a_complex_gradient() -> None:
    p = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = CTROptimizer([p])
    p.abs().sum().backward()
    with pytest.raises(TypeError, match=r"complex gradient of shape \(3,\)"):
        opt.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["one entry", "loss"])
@pytest.mark.parametrize(
    "options", [dict(), dict(trust_penalty=0.1, weight_decay=0.1, calibration_interval=1)], ids=str
)
def test_a_step_with_a_bad_gradient_is_skipped(where: str, bad: float, options: dict[str, Any]) -> None:
    model = net()
    opt = optimizer(model, lr=0.1, max_kl=1e-3, factor_structure="dense", **options)
    model.head.requires_grad_(True)
    opt.add_param_group({"params": list(model.head.parameters())})
    train(model, opt, 4)
    weights, factors, state = snapshot(model), factors_of(opt), copy.deepcopy(opt.state_dict()["state"])
    opt.zero_grad()
    backward(model, batch(4), weight=bad if where == "loss" else 1.0)
    if where == "one entry":
        model.down.lora_A.weight.grad[0, 1] = bad
    with pytest.warns(UserWarning, match="skipped a step"):
        opt.step()
    assert same(weights, snapshot(model))
    for name, f in factors_of(opt).items():
        assert all(torch.equal(f[k], factors[name][k]) for k in f)
    for key, entry in opt.state_dict()["state"].items():
        assert entry["step"] == state[key]["step"]
        for moment in ("exp_avg", "exp_avg_sq"):  # equal up to rounding, because the basis was recomputed
            torch.testing.assert_close(entry[moment], state[key][moment], rtol=1e-6, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert opt.metrics()["skipped_steps"] == 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, 2, start=5)
    assert not same(weights, snapshot(model))
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(t.isfinite().all() for f in factors_of(opt).values() for t in f.values())
    assert opt.metrics()["skipped_steps"] == 1


def test_a_bad_first_step_is_as_if_it_had_not_been() -> None:
    model, reference = net(), net()
    opt, plain = (optimizer(m, lr=0.1, max_kl=None, basis_interval=1) for m in (model, reference))
    backward(model, batch(), weight=math.nan)
    with pytest.warns(UserWarning, match="skipped a step"):
        opt.step()
    train(model, opt, 3)
    train(reference, plain, 3)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_skipped_steps_are_counted() -> None:
    model = net()
    opt = optimizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, weight in enumerate([1.0, math.nan, 1.0, math.inf, math.nan]):
            opt.zero_grad()
            backward(model, batch(step), weight=weight)
            opt.step()
            if step == 2:
                assert opt.metrics()["skipped_steps"] == 1
        assert opt.metrics()["skipped_steps"] == opt.metrics()["skipped_steps"] == 3
