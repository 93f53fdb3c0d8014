"""Adam in the K-FAC eigenbasis equals torch's AdamW for identity bases, and a dense reference for other bases."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    backward,
    batch,
    dense_factors,
    lora_layers,
    loss_of,
    net,
    optimizer,
    plain_weights,
    relative_error,
    train,
    trainable,
)
from torch import nn

from ctr_optim import CTROptimizer
from ctr_optim.direction.adam import change_basis_, rotate, unrotate


class Mixed(nn.Module):
    """Two LoRA layers of one shape, one of another shape, and parameters outside LoRA layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.twin = copy.deepcopy(self.net.up)
        self.free = nn.Parameter(torch.randn(4, 5))
        self.bias = nn.Parameter(torch.randn(5))


def groups(model: Mixed, second: dict[str, Any]) -> list[dict[str, Any]]:
    up = [p for n, p in model.named_parameters() if "lora_B" in n or n == "bias"]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not any(p is q for q in up)]
    return [{"params": rest}, {"params": up, **second}]


options = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-5, 1.0),
        "betas": st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.9999)),
        "eps": st.sampled_from([1e-8, 1e-6, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 1e-2, 0.5]),
        "maximize": st.booleans(),
    }
)


@pytest.mark.parametrize("curvature", ["none", "kfac"])
@given(
    first=options,
    second=st.fixed_dictionaries({"lr": st.floats(1e-5, 1.0), "weight_decay": st.sampled_from([0.0, 0.3])}),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    foreach=st.sampled_from([None, False]),
    seed=st.integers(0, 100),
)
def test_identity_bases_give_adamw(
    curvature: str, first: dict[str, Any], second: dict[str, Any], dtype: torch.dtype, foreach: bool | None, seed: int
) -> None:
    """No backward pass runs, so with ``kfac`` every factor is zero and every eigenbasis is the identity."""
    torch.manual_seed(seed)
    mine = Mixed().to(dtype)
    theirs = copy.deepcopy(mine)
    ours = CTROptimizer(
        groups(mine, second), model=mine, curvature=curvature, max_kl=None, basis_interval=2, foreach=foreach, **first
    )
    reference = torch.optim.AdamW(groups(theirs, second), foreach=False, **first)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        for p, q in zip(trainable(mine), trainable(theirs), strict=True):
            present = torch.rand((), generator=generator) > 0.25
            scale = 10 ** (4 * torch.rand((), generator=generator, dtype=torch.float64) - 3)
            grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
            p.grad, q.grad = (grad.clone(), grad.clone()) if present else (None, None)
        ours.step()
        reference.step()
    tol = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tol, atol=tol)
    for p, q in zip(trainable(mine), trainable(theirs), strict=True):
        state = reference.state[q]
        if not state:
            continue
        assert ours.state[p]["step"] == state["step"]
        torch.testing.assert_close(ours.state[p]["exp_avg"], state["exp_avg"], rtol=tol, atol=tol)
        torch.testing.assert_close(ours.state[p]["exp_avg_sq"], state["exp_avg_sq"], rtol=tol, atol=tol)


def test_no_curvature_trains_like_adamw() -> None:
    mine, theirs = net(), net()
    ours = optimizer(mine, curvature="none", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999))
    train(mine, ours, 10)
    train(theirs, torch.optim.AdamW(trainable(theirs), lr=1e-2, weight_decay=0.1), 10)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_learning_rates_may_be_tensors_and_scheduled() -> None:
    mine, theirs = net(), net()
    ours = optimizer(mine, curvature="none", lr=torch.tensor(1e-2), betas=(0.9, 0.999))
    reference = torch.optim.AdamW(trainable(theirs), lr=1e-2, weight_decay=0.0)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (ours, reference)]
    for step in range(6):
        train(mine, ours, 1, step)
        train(theirs, reference, 1, step)
        for schedule in schedules:
            schedule.step()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def orthogonal(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


@pytest.mark.parametrize("rank_dim, shape", [(-2, (3, 4, 7)), (-1, (3, 7, 4))])
def test_moments_move_between_bases(rank_dim: int, shape: tuple[int, ...]) -> None:
    old, new = orthogonal(3, 4, 4), orthogonal(3, 4, 4)
    m, v = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    moved_m, moved_v = m.clone(), v.clone()
    change_basis_(moved_m, moved_v, old, new, rank_dim)
    # The first moment is the same vector in other coordinates.
    torch.testing.assert_close(unrotate(moved_m, new, rank_dim), unrotate(m, old, rank_dim))
    torch.testing.assert_close(moved_m.norm(), m.norm())
    # The second moment is v <- (R o R) v with R = new^T old: averages of the old entries with the same sum.
    for i in range(3):
        R = new[i].mT @ old[i]
        expected = R.square() @ v[i] if rank_dim == -2 else v[i] @ R.square().mT
        torch.testing.assert_close(moved_v[i], expected)
    torch.testing.assert_close(moved_v.sum(rank_dim), v.sum(rank_dim))
    assert (moved_v >= 0).all()


@pytest.mark.parametrize("rank_dim, shape", [(-2, (4, 7)), (-1, (7, 4))])
def test_rotating_there_and_back(rank_dim: int, shape: tuple[int, ...]) -> None:
    x, Q = torch.randn(shape, dtype=torch.float64), orthogonal(4, 4)
    torch.testing.assert_close(unrotate(rotate(x, Q, rank_dim), Q, rank_dim), x)
    expected = Q.mT @ x if rank_dim == -2 else x @ Q
    torch.testing.assert_close(rotate(x, Q, rank_dim), expected)


def test_first_moments_survive_every_change_of_basis_in_training() -> None:
    beta, model = 0.8, net()
    opt = optimizer(model, betas=(beta, 0.9), lr=1e-2, max_kl=None)
    plain = {p: torch.zeros_like(p) for p in trainable(model)}
    for step in range(6):
        opt.zero_grad()
        backward(model, batch(step))
        for p in plain:
            plain[p] = beta * plain[p] + (1 - beta) * p.grad
        opt.step()
        for pair in opt.pairs:
            for p, rank_dim in ((pair.A, -2), (pair.B, -1)):
                state = opt.state[p]
                torch.testing.assert_close(unrotate(state["exp_avg"], state["basis"], rank_dim), plain[p])
                assert not torch.allclose(state["basis"].abs(), torch.eye(pair.rank, dtype=torch.float64), atol=1e-3)


def reference_run(
    model: nn.Module, steps: int, lr: float, betas: tuple[float, float], decay: float, fresh: set[int]
) -> None:
    """Train with the same method in dense algebra, one matrix at a time; the steps in ``fresh`` recompute the bases."""
    layers = lora_layers(model)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    state: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    weight = 0.0
    for step in range(steps):
        ids, labels = batch(step)
        new = dense_factors(model, layers, plain_weights, lambda m, i=ids, y=labels: loss_of(m(i), y))
        total = decay * weight + 1
        for name, f in new.items():
            old = factors.get(name, f)
            factors[name] = {k: (decay * weight * old[k] + f[k]) / total for k in "HD"}
        weight = total
        model.zero_grad()
        loss_of(model(ids), labels).backward()
        with torch.no_grad():
            for name, layer in layers.items():
                for p, key in ((layer.lora_A.weight, "D"), (layer.lora_B.weight, "H")):
                    grad = p.grad if key == "D" else p.grad.mT  # rank first
                    s = state.setdefault(p, {"Q": torch.eye(grad.shape[0]).to(grad), "m": grad * 0, "v": grad * 0})
                    if step in fresh:
                        Q = torch.linalg.eigh(factors[name][key])[1]
                        R = Q.mT @ s["Q"]
                        s["m"], s["v"], s["Q"] = R @ s["m"], (R * R) @ s["v"], Q
                    g = s["Q"].mT @ grad
                    s["m"] = betas[0] * s["m"] + (1 - betas[0]) * g
                    s["v"] = betas[1] * s["v"] + (1 - betas[1]) * g * g
                    m_hat, v_hat = (s[k] / (1 - b ** (step + 1)) for k, b in zip("mv", betas, strict=True))
                    delta = s["Q"] @ (m_hat / (v_hat.sqrt() + 1e-8))
                    p -= lr * (delta if key == "D" else delta.mT)


@pytest.mark.parametrize("interval, fresh", [(1, set(range(7))), (3, {0, 1, 2, 3, 6})])
def test_steps_equal_a_dense_reference(interval: int, fresh: set[int]) -> None:
    mine, theirs = net(), net()
    opt = optimizer(mine, lr=2e-2, betas=(0.9, 0.95), max_kl=None, factor_decay=0.8, basis_interval=interval)
    train(mine, opt, 7)
    reference_run(theirs, 7, 2e-2, (0.9, 0.95), 0.8, fresh)
    for p, q in zip(trainable(mine), trainable(theirs), strict=True):
        assert relative_error(p, q) < 1e-8
    start = net()
    assert all(relative_error(p, q) > 1e-2 for p, q in zip(trainable(mine), trainable(start), strict=True))


def deep(seed: int = 0) -> nn.Module:
    """Return a model with three pairs of one shape, so that batched calls serve several layers."""
    model = net(seed)
    torch.manual_seed(seed + 1)
    more = [copy.deepcopy(model.up) for _ in range(2)]
    for layer in more:
        nn.init.normal_(layer.lora_A.weight, std=0.5)
        nn.init.normal_(layer.lora_B.weight, std=0.5)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.more = model, nn.ModuleList(more)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.net.embed(ids)
            x = (self.net.up(x) + self.more[0](x.sin()) + self.more[1](x.cos())).tanh()
            return self.net.head(self.net.down(x).tanh())

    return Sum()


@pytest.mark.parametrize("structure", ["diagonal", "dense", "lowrank"])
def test_batched_layers_equal_single_ones(structure: str) -> None:
    results, predicted = [], []
    for foreach in (None, False):
        model = deep()
        opt = optimizer(
            model, lr=0.1, weight_decay=0.1, max_kl=1e-3, trust_penalty=1e-2, factor_structure=structure,
            calibration_interval=2, foreach=foreach,
        )  # fmt: skip
        train(model, opt, 6)
        results.append([p.detach() for p in trainable(model)])
        predicted.append(opt.metrics()["trust/predicted_kl"])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert predicted[0] == pytest.approx(predicted[1], rel=1e-7) and predicted[0] > 0


def test_a_layer_without_a_gradient_stays_where_it_is() -> None:
    model = deep()
    opt = optimizer(model, lr=0.1, weight_decay=0.5, trust_penalty=0.1)
    train(model, opt, 3)
    still = model.more[1]
    for p in trainable(still):
        p.requires_grad_(False)
    before = [p.detach().clone() for p in trainable(model)], [p.detach().clone() for p in still.parameters()]
    moments = {p: opt.state[p]["step"].clone() for p in still.parameters() if p in opt.state}
    opt.zero_grad()
    backward(model, batch(3))
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(still.parameters(), before[1], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(trainable(model), before[0], strict=True))
    assert all(opt.state[p]["step"] == count for p, count in moments.items()) and len(moments) == 2


def test_training_one_half_of_a_pair_alone() -> None:
    for frozen in ("lora_A", "lora_B"):
        model = net()
        for layer in lora_layers(model).values():
            getattr(layer, frozen).requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt = optimizer(model, lr=0.05)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, opt, 3)
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) == (not p.requires_grad), n


def test_half_precision_parameters_have_a_wide_state() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = net(dtype=dtype)
        opt = optimizer(model, lr=1e-2, trust_penalty=1e-3)
        train(model, opt, 3)
        for p in trainable(model):
            assert p.dtype == dtype and p.isfinite().all()
            assert all(t.dtype == torch.float32 for t in opt.state[p].values())
