"""Tests of the methods that the benchmarks implement from papers: RefLoRA and GRIT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny_llama
from torch import Tensor, nn

pytest.importorskip("peft", reason="the benchmarks adapt models with PEFT")

from benchmarks.quality import grit, reflora
from benchmarks.quality.averaging import WeightAverage
from benchmarks.quality.layers import lora_layers
from benchmarks.quality.methods import METHODS


def factors(rank: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return an unbalanced pair A ``(rank, 7)`` and B ``(5, rank)``, float64."""
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 7, dtype=torch.float64, generator=draw) * torch.tensor([[4.0], [0.3], [1.0]])[:rank]
    return a, 0.2 * torch.randn(5, rank, dtype=torch.float64, generator=draw)


def refactored(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pair ``P^T A``, ``B P^-T`` with ``P P^T = S``."""
    p = torch.linalg.cholesky(reflora.refactoring(a @ a.mT, b.mT @ b)[0])
    return p.mT @ a, b @ torch.linalg.inv(p).mT


def problem(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``||B A - W||^2 / 2`` with respect to A and B."""
    target = torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7)
    return b.mT @ (b @ a - target), (b @ a - target) @ a.mT


def test_refactoring_keeps_the_product_and_balances_the_pair() -> None:
    a, b = factors()
    new_a, new_b = refactored(a, b)
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(new_a @ new_a.mT, new_b.mT @ new_b, rtol=1e-8, atol=1e-11)


def test_the_inverse_is_that_of_s() -> None:
    a, b = factors()
    s, inverse = reflora.refactoring(a @ a.mT, b.mT @ b)
    torch.testing.assert_close(s @ inverse, torch.eye(3, dtype=torch.float64), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("bound", ["change of the product", "size of the pair"])
def test_refactoring_is_the_numerical_minimum(bound: str) -> None:
    """A search over all invertible P from the identity ends at the closed form's value, and at its S."""
    a, b = factors()

    def value(new_a: Tensor, new_b: Tensor) -> Tensor:
        if bound == "size of the pair":
            return new_a.square().sum() + new_b.square().sum()
        return (new_a.mT @ new_a).square().sum() + (new_b @ new_b.mT).square().sum()

    p = torch.eye(3, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([p], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        search.zero_grad()
        loss = value(p.mT @ a, b @ torch.linalg.inv(p).mT)
        loss.backward()
        return loss

    search.step(closure)
    found = value(p.mT @ a, b @ torch.linalg.inv(p).mT).item()
    assert found < 0.9 * value(a, b).item()
    assert value(*refactored(a, b)).item() == pytest.approx(found, rel=1e-7)
    torch.testing.assert_close((p @ p.mT).detach(), reflora.refactoring(a @ a.mT, b.mT @ b)[0], rtol=1e-4, atol=1e-6)


def moved(a: Tensor, b: Tensor, rate: float) -> Tensor:
    """Return the product after a gradient step on the pair."""
    grad_a, grad_b = problem(a, b)
    return (b - rate * grad_b) @ (a - rate * grad_a)


class Layers(nn.Module):
    """A model with one LoRA pair; the pair is found by a stub of :func:`lora_layers`."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(7, 3, bias=False).double(), nn.Linear(3, 5, bias=False).double()
        self.down.weight.data, self.up.weight.data = a.clone(), b.clone()


def test_a_step_on_new_gradients_is_the_step_on_the_new_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD with RefLoRA's gradients and SGD on the refactored pair reach the same product, for any first pair."""
    monkeypatch.setattr(reflora, "lora_layers", lambda model: iter([(model.down, model.up)]))
    a, b = factors()
    turn = torch.tensor([[2.0, 0.3, 0.0], [0.0, 0.5, 0.1], [0.4, 0.0, 1.0]], dtype=torch.float64)
    products = []
    for first_a, first_b in ((a, b), (turn @ a, b @ torch.linalg.inv(turn))):
        model = Layers(first_a, first_b)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        reflora.Refactorer(model, optimizer, warm_up=0)
        model.down.weight.grad, model.up.weight.grad = problem(first_a, first_b)
        optimizer.step()
        products.append((model.up.weight @ model.down.weight).detach())
    expected = moved(*refactored(a, b), rate=0.01)
    torch.testing.assert_close(products[0], expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(products[1], expected, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(moved(a, b, rate=0.01), expected, rtol=1e-3)


@pytest.mark.parametrize("warm_up", [0, 1])
def test_gradients_stay_in_the_warm_up_and_while_b_is_zero(monkeypatch: pytest.MonkeyPatch, warm_up: int) -> None:
    monkeypatch.setattr(reflora, "lora_layers", lambda model: iter([(model.down, model.up)]))
    a, b = factors()
    model = Layers(a, torch.zeros_like(b))  # S is 0 here.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    reflora.Refactorer(model, optimizer, warm_up)
    for same in (True, False):
        grads = problem(model.down.weight.data, model.up.weight.data)
        model.down.weight.grad, model.up.weight.grad = (g.clone() for g in grads)
        optimizer.step()
        assert torch.equal(model.up.weight.grad, grads[1]) is same
        assert torch.equal(model.down.weight.grad, grads[0]) is same
        assert bool(model.down.weight.isfinite().all() and model.up.weight.isfinite().all())


def llama() -> Any:
    return tiny_llama(dtype=torch.float64, peft=False)


def batch(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(4, 40, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def spec(method: str, **changes: Any) -> dict[str, Any]:
    return {"method": method, "rank": 6, "steps": 120, "lr": 1e-2, "options": {}, **changes}


def test_grit_collects_the_moments_of_the_rank_space() -> None:
    """Sigma_a is the mean of (A x)(A x)^T, Sigma_g that of (s B^T g)(s B^T g)^T; oracle: inputs and gradients."""
    torch.manual_seed(0)
    run = METHODS["adamw"](llama(), spec("adamw"), iter(()))
    model = run.model.double()
    down, up = next(lora_layers(model))
    nn.init.normal_(up.weight, std=0.1)
    watched = grit.Grit(model, run.optimizer, steps=100)
    watched.steps = grit.STATISTICS - 1
    layer = next(m for m in model.modules() if getattr(m, "lora_A", {}) and m.lora_A["default"] is down)
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda module, given, output: seen.update(x=given[0].detach()))
    layer.register_full_backward_hook(lambda module, into, out: seen.update(g=out[0].detach()))
    model(**batch()).loss.backward()
    h = seen["x"].flatten(0, -2) @ down.weight.mT
    e = layer.scaling["default"] * seen["g"].flatten(0, -2) @ up.weight
    found = watched.layers[0]
    assert found.tokens == len(h)
    torch.testing.assert_close(found.sigma_a, (h.mT @ h / len(h)).detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.sigma_g, (e.mT @ e / len(e)).detach(), rtol=1e-9, atol=1e-20)
    assert found.sigma_g.abs().max() > 0


def test_grit_averages_over_all_tokens() -> None:
    zero = torch.zeros(2, 2, dtype=torch.float64)
    layer = grit.Layer(nn.Parameter(zero), nn.Parameter(zero), zero.clone(), zero.clone())
    h, e = torch.randn(2, 10, 2, dtype=torch.float64)
    layer.add(h[:3], e[:3])
    layer.add(h[3:], e[3:])
    torch.testing.assert_close(layer.sigma_a, h.mT @ h / 10)
    torch.testing.assert_close(layer.sigma_g, e.mT @ e / 10)


def test_grit_inverts_with_relative_damping() -> None:
    a, _ = factors()
    sigma = a @ a.mT
    torch.testing.assert_close(grit.inverse(sigma, 0.0) @ sigma, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(1e6 * grit.inverse(1e6 * sigma), grit.inverse(sigma), rtol=1e-9, atol=0)
    assert torch.equal(grit.inverse(torch.zeros(3, 3)), torch.eye(3))


def test_grit_takes_the_fewest_directions_with_the_energy() -> None:
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    values = torch.tensor([0.6, 0.3, 0.08, 0.015, 0.005], dtype=torch.float64)
    sigma = (turn * values) @ turn.mT
    assert [grit.effective_rank(sigma, share, 1) for share in (0.5, 0.85, 0.95, 0.99, 1.0)] == [1, 2, 3, 4, 5]
    assert grit.effective_rank(sigma, 0.5, least=4) == 4
    projector = grit.projector(sigma, 2)
    torch.testing.assert_close(projector, turn[:, :2] @ turn[:, :2].mT)
    torch.testing.assert_close(projector @ projector, projector)


@pytest.mark.parametrize("sides", grit.SIDES)
def test_grit_preconditions_both_gradients(sides: str) -> None:
    run = METHODS["adamw"](llama(), spec("adamw"), iter(()))
    model = run.model.double()
    down, up = next(lora_layers(model))
    optimizer = torch.optim.SGD([down.weight, up.weight], lr=1.0)
    watched = grit.Grit(model, optimizer, steps=100, sides=sides)
    for_a, for_b = 2 * torch.eye(6, dtype=torch.float64), 3 * torch.eye(6, dtype=torch.float64)
    watched.layers[0].inverses = (for_a, for_b)
    before = down.weight.detach().clone(), up.weight.detach().clone()
    down.weight.grad, up.weight.grad = torch.ones_like(down.weight), torch.ones_like(up.weight)
    optimizer.step()
    by_a, by_b = (2.0, 3.0) if sides == "published" else (3.0, 2.0)
    torch.testing.assert_close(before[0] - down.weight, torch.full_like(down.weight, by_a))
    torch.testing.assert_close(before[1] - up.weight, torch.full_like(up.weight, by_b))


def test_grit_reprojects_every_interval_but_not_at_the_end() -> None:
    torch.manual_seed(0)
    run = METHODS["grit"](llama(), spec("grit", steps=100), iter(()))
    model = run.model
    steps = []
    for step in range(100):
        model(**batch(seed=step)).loss.backward()
        run.optimizer.step()
        before = [a.weight.detach().clone() for a, _ in lora_layers(model)]
        run.after_step(step)
        if any(not torch.equal(x, a.weight) for x, (a, _) in zip(before, lora_layers(model), strict=True)):
            steps.append(step + 1)
            assert any(torch.linalg.matrix_rank(a.weight, rtol=1e-5) < 6 for a, _ in lora_layers(model))
        run.optimizer.zero_grad()
    assert steps == [50]


def test_grit_refuses_unknown_sides() -> None:
    with pytest.raises(ValueError, match="sides: got 'both', expected one of"):
        METHODS["grit"](llama(), spec("grit", options={"sides": "both"}), iter(()))


@pytest.mark.parametrize("method", ["reflora", "grit"])
def test_they_start_at_the_base_and_learn(method: str) -> None:
    torch.manual_seed(0)
    run = METHODS[method](llama(), spec(method, steps=60), iter(()))
    losses = []
    for step in range(60):
        loss = run.model(**batch()).loss
        loss.backward()
        run.optimizer.step()
        run.after_step(step)
        run.optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(llama()(**batch()).loss.item(), rel=1e-6)
    assert losses[-1] < 0.9 * losses[0]


def test_weights_are_averaged_over_the_last_part() -> None:
    """Share 1 is the arithmetic mean; with share k, step i counts in proportion to ``(i - 1) ... (i - k + 1)``."""
    values = torch.randn(40, dtype=torch.float64)
    for share in (1, 4):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        average = WeightAverage([p], share)
        for value in values:
            p.data.fill_(value)
            average.update()
        average.put()
        counts = torch.arange(1, 41, dtype=torch.float64)
        weights = torch.ones(40, dtype=torch.float64)
        for k in range(1, share):
            weights *= (counts - k) / 40
        expected = (weights * values).sum() / weights.sum()
        assert p.item() == pytest.approx(expected.item(), rel=1e-9)
    with pytest.raises(ValueError, match=r"share: got 0\.5"):
        WeightAverage([p], 0.5)


def test_a_run_ends_at_the_averaged_weights() -> None:
    torch.manual_seed(0)
    run = METHODS["ctr"](llama(), spec("ctr", lr=None, options={"average": 1}), iter(()))
    seen = []
    for step in range(3):
        run.model(**batch(seed=step)).loss.backward()
        run.optimizer.step()
        run.after_step(step)
        run.optimizer.zero_grad()
        seen.append(next(lora_layers(run.model))[1].weight.detach().clone())
    assert run.finish is not None
    torch.testing.assert_close(next(lora_layers(run.finish()))[1].weight.detach(), torch.stack(seen).mean(0))
