"""The predicted KL of a step does not depend on the scale of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import backward, batch, loss_of, net, optimizer, snapshot, train
from torch import Tensor, nn

from ctr_optim import CTROptimizer
from ctr_optim.trust_region.logits import Logits
from ctr_optim.trust_region.loss_scale import LossScale, squares

pytestmark = pytest.mark.usefixtures("a_token_is_enough")

WEIGHTS = [1.0, 30.0, 0.1, 1e3, 1e-3, 5.0, 0.2, 1.0, 70.0, 1e-2]


def calibrated(model: nn.Module, **options: Any) -> CTROptimizer:
    return optimizer(model, **{"calibration_interval": 3, "max_kl": 1e-3, "lr": 0.1, **options})


def numbers(opt: CTROptimizer) -> dict[str, Any]:
    found: dict[str, Any] = opt.state_dict()["param_groups"][0]["ctr"]
    return found


def squared_scale(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return N times the sum of squares of the logits' gradient."""
    with torch.no_grad():
        logits = model(data[0])
    (gradient,) = torch.autograd.grad(loss_of(logits.requires_grad_(), data[1]), logits)
    return int((data[1] != -100).sum()) * float(gradient.square().sum())


# -- the property ------------------------------------------------------------------------------------------------------


def trained(weights: Sequence[float], structure: str) -> tuple[dict[str, Tensor], list[float]]:
    """Return the weights and the predicted KL of a run whose displacements do not depend on the loss's scale."""
    model = net()
    # Without memory and eps, Adam's step is the gradient's sign: the same for every scale of the gradient.
    opt = calibrated(model, betas=(0.0, 0.0), eps=1e-100, factor_structure=structure, factor_interval=2)
    predicted = []
    for step, weight in enumerate(weights):
        opt.zero_grad()
        backward(model, batch(step), weight=weight)
        opt.step()
        predicted.append(opt.metrics()["trust/predicted_kl"])
    return snapshot(model), predicted


@pytest.mark.parametrize("structure", ["diagonal", "dense", "lowrank"])
def test_weights_of_the_loss_change_no_prediction_and_no_step(structure: str) -> None:
    plain, expected = trained([1.0] * len(WEIGHTS), structure)
    weighted, got = trained(WEIGHTS, structure)
    assert got == pytest.approx(expected, rel=1e-8)
    for name, value in plain.items():
        torch.testing.assert_close(weighted[name], value, rtol=1e-8, atol=1e-10)


# -- the scale ---------------------------------------------------------------------------------------------------------


def test_squares_of_a_gradient() -> None:
    grad = torch.randn(2, 5, 7, dtype=torch.float64)
    grad[0, 1] = grad[1, 3] = 0
    torch.testing.assert_close(
        squares(grad), torch.stack([grad.square().sum(), torch.tensor(8.0, dtype=torch.float64)])
    )
    half = squares(grad.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half[0], grad.half().float().square().sum())


def test_micro_batches_have_the_scale_of_their_batch() -> None:
    parts = [batch(1), batch(2)]
    whole = tuple(torch.cat(t) for t in zip(*parts, strict=True))
    scales = []
    for pieces in ([whole], parts):
        model = net()
        opt = calibrated(model)
        for piece in pieces:
            backward(model, piece, weight=1 / len(pieces))  # type: ignore[arg-type]
        opt.step()
        scales.append(numbers(opt)["loss_scale"])
    assert scales[0] == pytest.approx(squared_scale(net(), whole))  # type: ignore[arg-type]
    assert scales[1] == pytest.approx(scales[0])


def test_the_average_has_the_weights_of_the_factors() -> None:
    model = net()
    opt = calibrated(model, factor_decay=0.9)
    average = 0.0
    for step in range(4):
        opt.zero_grad()
        now = squared_scale(model, batch(step))
        backward(model, batch(step))
        opt.step()
        weight = 0.1 / (1 - 0.9 ** (step + 1))
        average += weight * (now - average)
        assert numbers(opt)["loss_scale"] == pytest.approx(average)


def test_the_scale_of_a_gradscaler_cancels() -> None:
    scales = []
    for amplified in (1.0, 1024.0):
        model = net()
        opt = calibrated(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=amplified)
        ids, labels = batch()
        scaler.scale(loss_of(model(ids), labels)).backward()
        scaler.step(opt)
        scales.append(numbers(opt)["loss_scale"])
    assert scales[1] == pytest.approx(scales[0])


def test_cleared_gradients_do_not_count() -> None:
    model = net()
    opt = calibrated(model)
    backward(model, batch(1), weight=100.0)
    opt.zero_grad()
    expected = squared_scale(model, batch(2))
    backward(model, batch(2))
    opt.step()
    assert numbers(opt)["loss_scale"] == pytest.approx(expected)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("interval", [1, 5])
def test_gradients_that_the_model_clears_do_not_count(set_to_none: bool, interval: int) -> None:
    """``model.zero_grad()`` notifies no optimizer; the next forward pass finds no gradients."""
    model = net()
    opt = calibrated(model, factor_interval=interval)
    for _ in range(2):  # The first step updates the factors, the second one may not.
        backward(model, batch(1), weight=100.0)
        model.zero_grad(set_to_none)
        expected = squared_scale(model, batch(2))
        for part in (slice(2), slice(2, 4)):  # Micro-batches still add up.
            backward(model, tuple(t[part] for t in batch(2)), weight=0.5)  # type: ignore[arg-type]
        opt.step()
        model.zero_grad(set_to_none)
        assert float(opt._trust.loss_scale._now) == pytest.approx(expected)


def test_logits_that_the_loss_changes_in_place() -> None:
    """The last layer has a bias, so that it returns a view, which loses its hooks when it changes in place."""
    scales, sources = [], []
    for in_place in (False, True):
        model = net()
        opt = calibrated(model)
        ids, labels = batch(1)
        out = model(ids)
        loss_of(out.div_(2.0) if in_place else out / 2.0, labels).backward()
        opt.step()
        scales.append(numbers(opt)["loss_scale"])
        sources.append(opt.metrics()["trust/source"])
    assert scales[1] == pytest.approx(scales[0]) and scales[0] > 0
    assert sources == ["measured", "measured"]


@pytest.mark.parametrize("steps", [0, 1])
def test_transforms_between_steps_leave_no_trace(steps: int) -> None:
    """Per-sample gradients by torch.func and tracing work with every hook, and do not count as training."""
    model = net()
    opt = calibrated(model, factor_interval=10)
    train(model, opt, steps)
    opt.zero_grad()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, weights, (ids[None],)), labels[None])

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, *batch(3))
    torch.jit.trace(model, batch(3)[0])
    assert grads["up.lora_A.weight"].shape == (4, *model.up.lora_A.weight.shape)
    expected = squared_scale(model, batch(2))
    backward(model, batch(2))
    opt.step()
    assert float(opt._trust.loss_scale._now) == pytest.approx(expected)


# -- one object's hooks ------------------------------------------------------------------------------------------------

LIKE = torch.zeros((), dtype=torch.float64)


def observed(scale: LossScale) -> float:
    scale.observe(LIKE)
    scale.add(torch.ones(()))
    scale.settle()
    return scale.state.loss_scale


def logits() -> Tensor:
    return torch.ones(2, 3, dtype=torch.float64, requires_grad=True) * 1.0


def test_a_wrapper_that_returns_the_same_logits_counts_once() -> None:
    scale, out = LossScale(), logits()
    scale.see(1, Logits([out], True))
    scale.see(0, Logits([out], True))
    out.sum().backward()
    assert observed(scale) == pytest.approx(2 * 6)


@pytest.mark.parametrize("outer", [True, False])
def test_the_outermost_logits_with_a_gradient_count(outer: bool) -> None:
    scale, out = LossScale(), logits()
    scale.see(1, Logits([out], True))
    copy = out * 3
    scale.see(0, Logits([copy], True))
    (copy if outer else out).sum().backward()
    assert observed(scale) == pytest.approx(2 * 6)


def test_chunks_add_up() -> None:
    scale, out = LossScale(), logits()
    chunks = list(out.unflatten(0, (1, 2)).split(1, 1))
    scale.see(0, Logits(chunks, False))
    torch.cat(chunks, 1).sum().backward()
    assert observed(scale) == pytest.approx(2 * 6)


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_a_step_without_a_scale_has_the_average_one(bad: float | None) -> None:
    scale = LossScale()
    scale.observe(LIKE)
    assert [float(x) for x in scale.add(torch.ones(()))] == [1, 1]
    assert float(scale.form) == 1
    out = logits()
    scale.see(0, Logits([out], True))
    out.sum().backward()
    assert observed(scale) == pytest.approx(12)
    if bad is not None:
        out = logits()
        scale.see(0, Logits([out], True))
        (out * bad).sum().backward()
    scale.observe(LIKE)
    assert [float(x) for x in scale.add(torch.ones(()))] == [1, 1]
    assert float(scale.form) == 1


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_the_scale_loads_and_continues() -> None:
    model = net()
    opt = calibrated(model)
    for step in range(3):
        opt.zero_grad()
        backward(model, batch(step))
        opt.step()
    saved = opt.state_dict()
    for name in ("loss_scale", "loss_scale_unit"):
        assert saved["param_groups"][0]["ctr"].pop(name) > 0
    fresh = net()
    fresh.load_state_dict(model.state_dict())
    later = calibrated(fresh)
    later.load_state_dict(saved)
    assert numbers(later)["loss_scale"] == 0
    expected = squared_scale(fresh, batch(5))
    later.zero_grad()
    backward(fresh, batch(5))
    later.step()
    assert numbers(later)["loss_scale"] == pytest.approx(expected)
    assert later.metrics()["trust/predicted_kl"] <= 1e-3 * (1 + 1e-4)


def test_no_calibration_and_sum_losses_observe_nothing() -> None:
    for options in ({"calibration_interval": None}, {"loss_reduction": "sum"}, {"curvature": "none"}):
        assert "loss_scale" not in numbers(calibrated(net(), **options))
