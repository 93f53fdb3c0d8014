"""Training continues, with a warning, after non-finite numbers, failed decompositions and missing statistics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import (
    LoRALinear,
    assert_factors,
    backward,
    batch,
    factors_of,
    finite,
    held,
    loss_of,
    net,
    optimizer,
    same,
    snapshot,
    train,
    trainable,
    weights_of,
)
from torch.linalg import LinAlgError

from ctr_optim.curvature.factors import Dense, LowRank

RANKS: dict[str, Any] = dict(interval=4, window=2, hysteresis=0.0, absent="sketch")


# -- non-finite numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("structure", ["diagonal", "lowrank", "dense"])
def test_inputs_that_are_not_finite(bad: float, structure: str) -> None:
    model, reference = net(), net()
    opt, other = (optimizer(m, factor_structure=structure, max_kl=1e-3) for m in (model, reference))
    train(model, opt, 3), train(reference, other, 3)
    before = snapshot(model)
    poison = model.embed.register_forward_hook(lambda _m, _a, out: out.index_fill(1, torch.tensor([3]), bad))
    opt.zero_grad()
    backward(model, batch(3))
    poison.remove()
    with pytest.warns(UserWarning, match="skipped a step"):
        opt.step()
    assert same(snapshot(model), before)
    assert_factors(factors_of(opt), factors_of(other), 1e-12)
    train(model, opt, 3, start=4)
    assert finite(model) and held(opt) and not same(snapshot(model), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["rank_input", "rank_output", "input", "output"])
@pytest.mark.parametrize("structure", ["diagonal", "lowrank", "dense"])
def test_a_damaged_factor_stops_the_step_and_begins_anew(structure: str, where: str, bad: float) -> None:
    """A flipped bit in memory: steps without a predicted KL are not taken, and the next update restores the factor."""
    model = net(dtype=torch.float32)
    opt = optimizer(model, max_kl=1e-3, factor_interval=4, basis_interval=4, factor_structure=structure)
    train(model, opt, 5)  # factors are updated at steps 0, 1, 2, 4, 8, ...
    state = opt.state[model.up.lora_B.weight]
    names = [where] if where.startswith("rank") else [n for n in state if n.startswith(where)]
    for name in names:
        state[name][0] = bad
    before, moments = snapshot(model), state["exp_avg"].clone()
    train(model, opt, 1, start=5)
    assert same(snapshot(model), before) and opt.metrics()["trust/scale"] == 0.0
    assert not torch.equal(state["exp_avg"], moments)  # the moments still take the gradient
    train(model, opt, 3, start=6)  # steps 6, 7 and 8; step 8 updates the factors
    assert not same(snapshot(model), before) and finite(model)
    assert all(t.isfinite().all() for s in opt.state.values() for t in s.values())
    state = opt.state[model.up.lora_B.weight]
    assert state["factor_updates"] == 1 and opt.state[model.down.lora_B.weight]["factor_updates"] == 5
    for step in range(9, 20):
        train(model, opt, 1, start=step)
        assert held(opt) and finite(model)


def test_gradients_that_overflow_when_squared_leave_the_factors_alone() -> None:
    model = net(dtype=torch.float32)
    opt = optimizer(model, max_kl=1e-3)
    train(model, opt, 3)
    before = factors_of(opt)
    opt.zero_grad()
    backward(model, batch(3), weight=1e30)
    assert all(p.grad.isfinite().all() for p in trainable(model))
    opt.step()
    assert_factors(factors_of(opt), before, 1e-12)
    assert finite(model) and held(opt)


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[None]:
    """Return a context in which the named functions of torch.linalg do not converge."""

    def fail(*_: Any, **__: Any) -> None:
        raise LinAlgError("linalg.eigh: the algorithm failed to converge")

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(torch.linalg, name, fail)
        yield


# -- decompositions that fail ------------------------------------------------------------------------------------------


def test_a_failed_eigenbasis_is_kept_counted_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    opt = optimizer(model, max_kl=1e-3)
    train(model, opt, 3)
    bases = {p: opt.state[p]["basis"].clone() for p in trainable(model)}
    with failing(monkeypatch, "eigh"), pytest.warns(UserWarning, match="could not decompose an eigenbasis"):
        train(model, opt, 2, start=3)
    assert all(torch.equal(opt.state[p]["basis"], basis) for p, basis in bases.items())
    assert opt.metrics()["failed_decompositions"] == 2 * 4 and held(opt)  # two steps, A and B of two layers
    train(model, opt, 1, start=5)
    assert not any(torch.equal(opt.state[p]["basis"], basis) for p, basis in bases.items())
    assert opt.metrics()["failed_decompositions"] == 8
    _, other = net(), optimizer(net())
    other.load_state_dict(opt.state_dict())
    assert other.metrics()["failed_decompositions"] == 8


def test_a_rank_event_that_fails_changes_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    opt = optimizer(model, rank_scheduler=RANKS)
    heard: list[Any] = []
    opt.on_rank_event(heard.append)
    train(model, opt, 3)
    before = weights_of(opt)
    with failing(monkeypatch, "pinv"), pytest.warns(UserWarning, match="all ranks stay as they are"):
        train(model, opt, 1, start=3)
    assert not heard and opt.metrics()["failed_decompositions"] == 1
    assert all(a.shape == before[n][0].shape for n, (a, _) in weights_of(opt).items())
    assert not any("sketch_range" in opt.state[pair.B] for pair in opt.pairs)
    train(model, opt, 8, start=4)
    assert heard and finite(model)


def test_a_whitener_that_fails_falls_back_to_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5, 5, dtype=torch.float64)
    matrix = x @ x.mT
    with failing(monkeypatch, "eigh"):
        W = Dense(matrix).whitener(0.1)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    expected = (diagonal + 0.1 * diagonal.mean(-1, keepdim=True)).rsqrt()
    torch.testing.assert_close(W, torch.diag_embed(expected))


def test_a_sketch_that_is_not_finite_leaves_the_diagonal() -> None:
    factor = LowRank(*LowRank.sums(torch.randn(9, 6, dtype=torch.float64), torch.float64))
    factor.tensors[0][2, 1] = math.nan
    assert torch.equal(factor.to_dense(), factor.tensors[1].diag())


# -- missing statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["diagonal", "lowrank", "dense"])
def test_factors_that_are_all_zero(structure: str) -> None:
    """If the loss does not depend on the model, all gradients and factors are zero."""
    model = net(dtype=torch.float32)
    opt = optimizer(model, rank_scheduler=RANKS, factor_structure=structure, max_kl=1e-3)
    before = snapshot(model)
    for step in range(9):
        opt.zero_grad()
        backward(model, batch(step), weight=0.0)
        opt.step()
    assert finite(model) and held(opt)
    after = snapshot(model)
    assert all(torch.equal(before[k], after[k]) for k in before if "lora" not in k)
    ids = batch()[0]
    reference = net(dtype=torch.float32)
    torch.testing.assert_close(model(ids), reference(ids), rtol=1e-4, atol=1e-5)
    train(model, opt, 6, start=9)
    assert finite(model) and held(opt) and not same(after, snapshot(model))


@pytest.mark.parametrize("structure", ["diagonal", "lowrank", "dense"])
def test_factors_of_rank_one(structure: str) -> None:
    """Every batch repeats the same single token."""
    model = net(dtype=torch.float32)
    opt = optimizer(model, rank_scheduler=RANKS, factor_structure=structure, max_kl=1e-3)
    data = torch.full((2, 3), 5), torch.full((2, 3), 7)
    first = float(loss_of(model(data[0]), data[1]))
    for _ in range(13):
        opt.zero_grad()
        backward(model, data)
        opt.step()
        assert held(opt) and finite(model)
    assert float(loss_of(model(data[0]), data[1])) < first


def test_a_layer_that_is_never_used() -> None:
    model = net()
    model.spare = LoRALinear(8, 7, 3, 1.0).double()
    opt = optimizer(model, rank_scheduler=RANKS, weight_decay=0.1, max_kl=1e-3)
    before = snapshot(model)
    for step in range(9):
        train(model, opt, 1, step)
        assert held(opt) and finite(model)
    ranks = opt.metrics()["ranks"]
    assert ranks.keys() == {"up", "down", "spare"} and min(ranks.values()) >= 1
    kept = model.spare.lora_B.weight @ model.spare.lora_A.weight
    assert ranks["spare"] < 3 or torch.allclose(kept, before["spare.lora_B.weight"] @ before["spare.lora_A.weight"])
    assert opt.metrics()["kl_from_base/layer"]["spare"] == 0.0
    assert sum(p.A.numel() + p.B.numel() for p in opt.pairs) <= sum(before[k].numel() for k in before if "lora" in k)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_without_a_loss_token(reduction: str) -> None:
    """The mean over no tokens is NaN, so the step is skipped. The sum is zero, so the factors get no new token."""
    model, reference = net(), net()
    opt, other = (optimizer(m, max_kl=1e-3, loss_reduction=reduction) for m in (model, reference))
    for step in range(3):
        for m, o in ((model, opt), (reference, other)):
            o.zero_grad()
            backward(m, batch(step), reduction)
            o.step()
    ids, labels = batch(3)
    for data in ((ids, torch.full_like(labels, -100)), (ids[:0], labels[:0])):
        opt.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backward(model, data, reduction)
            opt.step()
    assert_factors(factors_of(opt), factors_of(other), 1e-12)
    assert finite(model) and held(opt)
