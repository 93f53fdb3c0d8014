"""Resizing layers keeps the outputs, the optimizer's moments and the factors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Net, backward, batch, factors_of, lora_layers, net, optimizer, relative_error, train
from torch import Tensor

from ctr_optim import CTROptimizer
from ctr_optim.ranks.allocation import Survey, resize, survey
from ctr_optim.ranks.resize import projection
from ctr_optim.ranks.valuation import existing_directions

SEEDS = st.integers(0, 10_000)


def trained(seed: int = 0, rank: int = 4, **options: Any) -> tuple[Net, CTROptimizer]:
    """Return a net and its optimizer with moments, factors and a gradient sketch."""
    model = net(seed, **{"rank": rank, "dtype": torch.float64, **options})
    opt = optimizer(model, factor_structure="dense", lr=0.02, max_kl=None, basis_interval=2)
    train(model, opt, 3)
    opt.open_sketch(3)
    train(model, opt, 2, start=3)
    opt.zero_grad()
    return model, opt


def surveys(opt: CTROptimizer) -> Iterator[Survey]:
    for block in opt.blocks:
        yield from survey(block, 2, 0.1)


def resized(opt: CTROptimizer, kept: int, added: int) -> None:
    for s in list(surveys(opt)):
        for name in ("sketch_range", "sketch_corange"):
            opt.state[s.pair.B].pop(name)
        resize([s], kept, added, opt.state.get)
    opt.load_state_dict(opt.state_dict())  # the resize replaced the state, so the optimizer must restack it


def raw_moments(opt: CTROptimizer) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the first moments of A and B in the coordinates of the weights."""
    found = {}
    for pair in opt.pairs:
        a, b = opt.state[pair.A], opt.state[pair.B]
        found[pair.name] = ((a["basis"] @ a["exp_avg"]).clone(), (b["exp_avg"] @ b["basis"].mT).clone())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=SEEDS, added=st.integers(1, 3))
def test_growth_leaves_the_function_alone(dtype: torch.dtype, seed: int, added: int) -> None:
    model, opt = trained(seed, dtype=dtype)
    before = model(batch()[0]).detach()
    a = {pair.name: pair.A.detach().clone() for pair in opt.pairs}
    resized(opt, 4, added)
    assert relative_error(model(batch()[0]).detach(), before) < 1e-6
    for pair in opt.pairs:
        assert pair.rank == 4 + added and pair.down.out_features == pair.up.in_features == pair.rank
        assert torch.equal(pair.A[:4], a[pair.name])
        assert pair.A[4:].norm(dim=-1).min() > 0 and pair.B[:, 4:].abs().max() == 0


@pytest.mark.parametrize("side", ["a", "b", "grown"])
@given(seed=SEEDS)
def test_dropping_what_is_worth_nothing_leaves_the_function_alone(side: str, seed: int) -> None:
    model = net(seed, dtype=torch.float32, rank=5)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            if side == "a":
                layer.lora_A.weight[4] = layer.lora_A.weight[:2].sum(0)
            elif side == "b":
                layer.lora_B.weight[:, 1] = 0
            else:
                layer.lora_B.weight[:, 3:] = 0
    opt = optimizer(model, factor_structure="dense", lr=0.0, max_kl=None)
    backward(model, batch())
    opt.step()
    opt.open_sketch(2)
    before = model(batch()[0]).detach()
    resized(opt, 3 if side == "grown" else 4, 0)
    assert relative_error(model(batch()[0]).detach(), before) < 1e-6


def test_there_and_back_again() -> None:
    """A shrink after a growth restores weights, moments and factors, up to a rotation."""
    model, opt = trained()
    before, moments, factors = model(batch()[0]).detach(), raw_moments(opt), factors_of(opt)
    products = {p.name: (p.B @ p.A).detach() for p in opt.pairs}
    old_a = {p.name: p.A.detach().clone() for p in opt.pairs}
    resized(opt, 4, 2)
    opt.open_sketch(2)
    resized(opt, 4, 0)
    assert relative_error(model(batch()[0]).detach(), before) < 1e-9
    now = raw_moments(opt)
    for pair in opt.pairs:
        assert relative_error((pair.B @ pair.A).detach(), products[pair.name]) < 1e-9
        turn = pair.A.detach() @ torch.linalg.pinv(old_a[pair.name])
        assert relative_error(turn.mT @ now[pair.name][0], moments[pair.name][0]) < 1e-6
        H = turn @ factors[pair.name]["H"] @ turn.mT
        assert relative_error(opt.state[pair.B]["rank_input"], H) < 1e-6


@given(seed=SEEDS, kept=st.integers(0, 3), added=st.integers(0, 2))
def test_moments_move_like_gradients(seed: int, kept: int, added: int) -> None:
    """Autograd's gradients at the new weights are ``M^T g_A`` and ``g_B N^T``; first moments use the same maps."""
    if kept + added == 0:
        return
    _, opt = trained(seed)
    moments, maps = raw_moments(opt), {s.pair.name: projection(s.existing, kept) for s in surveys(opt)}
    second = {p: opt.state[p]["exp_avg_sq"].clone() for pair in opt.pairs for p in (pair.A, pair.B)}
    resized(opt, kept, added)
    now = raw_moments(opt)
    for pair in opt.pairs:
        on, (m_a, m_b) = maps[pair.name], moments[pair.name]
        assert torch.allclose(on.keep @ on.keep.mT, torch.eye(kept).double(), atol=1e-12)
        assert torch.allclose(on.keep @ on.restore, torch.eye(kept).double(), atol=1e-8)
        torch.testing.assert_close(now[pair.name][0][:kept], on.restore.mT @ m_a, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(now[pair.name][1][:, :kept], m_b @ on.keep.mT, rtol=1e-8, atol=1e-12)
        assert now[pair.name][0][kept:].abs().sum() == now[pair.name][1][:, kept:].abs().sum() == 0
        for p, dim in ((pair.A, 0), (pair.B, 1)):
            state = opt.state[p]
            assert all(state[k].shape == p.shape for k in ("exp_avg", "exp_avg_sq"))
            basis = state["basis"]
            assert torch.allclose(basis.mT @ basis, torch.eye(pair.rank).double(), atol=1e-10)
            assert (state["exp_avg_sq"] >= 0).all()
            for row in state["exp_avg_sq"].movedim(dim, 0)[kept:]:
                torch.testing.assert_close(row, second[p].mean(dim))


def test_the_map_of_gradients_is_what_autograd_says() -> None:
    a, b, g = torch.randn(4, 9).double(), torch.randn(7, 4).double(), torch.randn(7, 9).double()
    H, D = a @ a.mT, b.mT @ b
    on = projection(existing_directions(H, D), 4)  # keeps all four directions, so only the coordinates change
    old = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    new = [(on.keep @ a).requires_grad_(), (b @ on.restore).requires_grad_()]
    g_a, g_b = torch.autograd.grad(((old[1] @ old[0]) * g).sum(), old)
    n_a, n_b = torch.autograd.grad(((new[1] @ new[0]) * g).sum(), new)
    torch.testing.assert_close(n_a, on.restore.mT @ g_a)
    torch.testing.assert_close(n_b, g_b @ on.keep.mT)


@given(seed=SEEDS, kept=st.integers(1, 4), added=st.integers(0, 2))
def test_rank_factors_stay_those_of_the_wide_ones(seed: int, kept: int, added: int) -> None:
    """If H = A C A^T and D = B^T S B hold before a resize, they hold after it."""
    model = net(seed, rank=4)
    opt = optimizer(model, factor_structure="dense", lr=0.0, max_kl=None)
    train(model, opt, 2)
    opt.open_sketch(2)
    train(model, opt, 1, start=2)
    resized(opt, kept, added)
    for pair in opt.pairs:
        f = factors_of(opt)[pair.name]
        a, b = pair.A.detach(), pair.B.detach()
        assert relative_error(f["H"], a @ f["C"] @ a.mT) < 1e-8
        assert relative_error(f["D"], b.mT @ f["S"] @ b) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_keeps_its_dtype_and_training_goes_on(dtype: torch.dtype) -> None:
    model, opt = trained(dtype=dtype)
    parameters, before = list(model.parameters()), factors_of(opt)
    resized(opt, 2, 1)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    for pair in opt.pairs:
        assert pair.A.dtype == pair.B.dtype == dtype
        for p in (pair.A, pair.B):
            assert all(t.dtype == torch.float32 for t in opt.state[p].values())
        assert torch.equal(factors_of(opt)[pair.name]["C"], before[pair.name]["C"])
    weights = copy.deepcopy(model.state_dict())
    train(model, opt, 3, start=5)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(not torch.equal(weights[f"{p.name}.lora_B.weight"], p.B) for p in opt.pairs)


def test_shapes_of_another_layer_are_refused() -> None:
    _, opt = trained()
    pair = opt.pairs[0]
    for a, b in [((3, 9), (10, 3)), ((3, 8), (10, 4)), ((0, 8), (10, 0)), ((9, 8), (10, 9))]:
        with pytest.raises(ValueError, match=r"up: cannot take A .* 1 <= r <= 8"):
            pair.resize(torch.zeros(a), torch.zeros(b))
