"""The Hessian's diagonal from differences of gradients."""

import pytest
import torch
from torch import nn

from ctr_optim import CTROptimizer
from ctr_optim.curvature import hutchinson
from ctr_optim.direction.stack import Stack, initial_state
from tests.support import llama_batch, tiny_llama


def quadratic_problem(diagonal_only: bool):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
    h = torch.randn(6, 6, dtype=torch.float64)
    h = torch.diag(h.diag().abs()) if diagonal_only else h @ h.T
    state: dict = {p: {}}
    state[p].update(initial_state(p, None))
    hutchinson.Hutchinson(None, 0.9, None).prepare(state, [p])
    stack = Stack([p], {"lr": 1.0}, state, None)

    def gradients(params):
        return [(h @ params[0].detach().reshape(-1)).reshape(2, 3)]

    return p, h, stack, gradients


def test_one_sample_is_exact_for_a_diagonal_hessian():
    p, h, stack, gradients = quadratic_problem(diagonal_only=True)
    before = p.detach().clone()
    (sample,) = hutchinson.sample_diagonal([stack], gradients, seed=3)
    torch.testing.assert_close(sample[0].reshape(-1), h.diag(), rtol=1e-8, atol=1e-10)
    assert torch.equal(p, before)


def test_the_mean_of_samples_is_the_diagonal_of_a_full_hessian():
    _, h, stack, gradients = quadratic_problem(diagonal_only=False)
    samples = torch.stack([hutchinson.sample_diagonal([stack], gradients, seed=s)[0] for s in range(4000)])
    error = samples.mean(0).reshape(-1) - h.diag()
    spread = samples.std(0).reshape(-1) / 4000**0.5
    assert (error.abs() < 5 * spread + 1e-9).all()


def test_the_moving_average_is_unbiased_from_the_first_sample_on_and_ignores_what_is_not_finite():
    _, _, stack, _ = quadratic_problem(diagonal_only=True)
    first = torch.full((1, 2, 3), 2.0, dtype=torch.float64)
    hutchinson.update_diagonal_(stack, first, decay=0.9, updates=1)
    torch.testing.assert_close(stack.tensors["hessian_diagonal"], first)
    hutchinson.update_diagonal_(stack, first * torch.nan, decay=0.9, updates=2)
    torch.testing.assert_close(stack.tensors["hessian_diagonal"], first)
    delta = torch.full((1, 2, 3), 0.5, dtype=torch.float64)
    assert float(hutchinson.quadratic(stack, delta)) == pytest.approx(6 * 2.0 * 0.25)


def test_training_holds_the_bound_and_resumes_exactly():
    model, batch = tiny_llama(), llama_batch()
    optimizer = CTROptimizer(model.parameters(), curvature="hutchinson", max_kl=1e-2, calibration_interval=3)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = optimizer.metrics()
        assert metrics["trust/predicted_kl"] <= 1e-2 * (1 + 1e-4)
        losses.append(float(loss.detach()))
    assert metrics["trust/source"] == "measured"
    assert losses[-1] < losses[0]
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    for entry in optimizer.state.values():
        assert "hessian_diagonal" in entry


def test_a_model_that_does_not_return_its_loss_is_told_so():
    model, batch = tiny_llama(), llama_batch()
    labels = batch.pop("labels")
    optimizer = CTROptimizer(model.parameters(), curvature="hutchinson")
    logits = model(**batch).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.clamp_min(0).flatten()).backward()
    with pytest.raises(ValueError, match="hutchinson"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:CTROptimizer cannot measure")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_sample_that_fails_is_left_out(error, monkeypatch):
    """Before the first sample, the metric comes from gradients alone, so that the first steps are also bounded."""
    model, batch = tiny_llama(), llama_batch()
    optimizer = CTROptimizer(
        model.parameters(), curvature="hutchinson", max_kl=1e-2, calibration_interval=1, kl_schedule="constant"
    )
    probe, before = optimizer._curvature.prober, [p.detach().clone() for p in model.parameters()]
    working = probe.gradients

    def fails(params):
        raise error("no gradients today")

    def step():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        return optimizer.metrics()

    monkeypatch.setattr(probe, "gradients", fails)
    metrics = step()
    assert metrics["trust/source"] == "measured" and metrics["trust/predicted_kl"] == pytest.approx(1e-2)
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not any(bool(entry["hessian_diagonal"].any()) for entry in optimizer.state.values())
    monkeypatch.setattr(probe, "gradients", working)
    step()
    assert any(bool(entry["hessian_diagonal"].any()) for entry in optimizer.state.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_never_gives_a_hessian_of_zero(reentrant: bool) -> None:
    """Reentrant checkpointing hides the parameters from autograd, which is a failure and not a gradient of zero."""
    model, batch = tiny_llama(), llama_batch()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    params = [p for p in model.train().parameters() if p.requires_grad]
    opt = CTROptimizer(params, model=model, curvature="hutchinson", calibration_interval=1)
    model(**batch).loss.backward()
    opt.step()
    refused, sizes = opt._curvature.prober.refused, [opt.state[p]["hessian_diagonal"].norm() for p in params]
    if reentrant:
        assert refused is not None and "use_reentrant" in refused
    else:
        assert refused is None and all(size > 0 for size in sizes)
