"""CTROptimizer passes the checks of torch's own optimizer test suite, through torch's harness.

The harness (``torch.testing._internal.common_optimizers``) is part of torch. The tests that use it are not, so this
file contains its own versions. These checks are left out:

- ``fused``, ``capturable``, ``differentiable``, ``amsgrad``: CTROptimizer has no such options.
- sparse gradients and complex parameters: they raise a TypeError, which is tested.
- CUDA graphs, state on several devices, peak memory of foreach: they need a GPU.
- ``step`` under ``torch.compile``: only the model is compiled.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from foreign import INFO, build, error_inputs, every_configuration, harness, inputs, regression, trained
from support import backward, batch, net, optimizer, train, trainable
from torch.nn import Parameter

from ctr_optim import CTROptimizer


def test_the_harness_knows_us() -> None:
    assert INFO.name == "CTROptimizer"
    flags = {"foreach", "fused", "differentiable"}
    assert not any(flags & set(given.kwargs) for given in INFO.optim_inputs_func("cpu"))
    assert harness._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, INFO)


@pytest.mark.parametrize(
    "given", [pytest.param(e, id=e.optimizer_error_input.desc) for e in error_inputs("cpu", torch.float32)]
)
def test_error_inputs(given: Any) -> None:
    wrong = given.optimizer_error_input
    params = wrong.params if wrong.params is not None else [Parameter(torch.randn(2, 3))]
    if issubclass(given.error_type, Warning):
        with pytest.warns(given.error_type, match=given.error_regex):
            CTROptimizer(params, **wrong.kwargs)
    else:
        with pytest.raises(given.error_type, match=given.error_regex):
            CTROptimizer(params, **wrong.kwargs)


@every_configuration
@pytest.mark.parametrize("noncontiguous", [False, True])
@pytest.mark.parametrize("schedulers", INFO.scheduler_inputs, ids=("step", "plateau", "linear and exponential"))
def test_goes_in_the_right_direction(kwargs: dict[str, Any], noncontiguous: bool, schedulers: Any) -> None:
    params, loss = regression(noncontiguous)
    opt = build(params, kwargs)
    schedules = [make(opt) for make in schedulers]
    first = float(loss())
    for _ in range(20):
        value = opt.step(loss)
        for schedule in schedules:
            plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
            schedule.step(*([value] if plateau else []))
    last = float(loss())
    assert last > first if kwargs.get("maximize") else last < first
    assert opt.param_groups[0]["lr"] != kwargs.get("lr", 8e-2) or len(schedules) == 1


@every_configuration
def test_parameter_groups(kwargs: dict[str, Any]) -> None:
    params, loss = regression()
    lr = float(kwargs.get("lr", 2e-4))
    still = [p.detach().clone() for p in params]
    opt = build([{"params": [params[0]], "lr": lr / 10}, {"params": [params[1]], "lr": 0.0}], kwargs)
    assert [float(g["lr"]) for g in opt.param_groups] == [lr / 10, 0.0]
    first = float(loss())
    for _ in range(20):
        opt.step(loss)
    assert (float(loss()) > first) == bool(kwargs.get("maximize"))
    assert torch.equal(params[1], still[1]) and not torch.equal(params[0], still[0])


def test_weight_decay_of_a_group() -> None:
    weights = [Parameter(torch.full((3, 3), 2.0)) for _ in range(2)]
    opt = CTROptimizer([{"params": [weights[0]]}, {"params": [weights[1]], "weight_decay": 0.5}], lr=0.1, max_kl=None)
    for w in weights:
        w.grad = torch.zeros_like(w)
    opt.step()
    assert torch.equal(weights[0], torch.full((3, 3), 2.0))
    torch.testing.assert_close(weights[1], torch.full((3, 3), 2.0 * (1 - 0.1 * 0.5)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_lr(shape: tuple[int, ...]) -> None:
    """A tensor lr has the effect of a float, also after an in-place change; the optimizer does not change it."""
    (params, loss), (others, other_loss) = regression(), regression()
    lr = torch.full(shape, 0.01)
    opt, reference = CTROptimizer(params, lr=lr), CTROptimizer(others, lr=0.01)
    for step in range(6):
        if step == 3:
            lr.fill_(0.005)
            reference.param_groups[0]["lr"] = 0.005
        loss(), other_loss()
        opt.step(), reference.step()
        assert opt.param_groups[0]["lr"] is lr
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_tensor_lr_on_lora_layers() -> None:
    model, reference = net(), net()
    lr = torch.tensor(0.05, dtype=torch.float64)
    opt, other = optimizer(model, lr=lr), optimizer(reference, lr=0.05)
    train(model, opt, 4), train(reference, other, 4)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [given.kwargs for given in inputs("cpu")], ids=[g.desc for g in inputs("cpu")])
def test_foreach_is_the_loop(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    tracker = harness.TensorTracker()
    for foreach in (False, True):
        model = net(dtype=dtype)
        opt = optimizer(model, **{**copy.deepcopy(kwargs), "foreach": foreach})
        for step in range(3):
            train(model, opt, 1, step)
            for p in trainable(model):
                if not foreach:
                    tracker.add(p)
                else:
                    expected = tracker.tensors.pop(0)
                    torch.testing.assert_close(p.detach(), expected)
                    with torch.no_grad():
                        p.copy_(expected)
    assert tracker.all_popped()


def test_mixed_dtypes_are_the_loop() -> None:
    def parameters() -> list[Parameter]:
        generator = torch.Generator().manual_seed(0)
        dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        shapes = ((2, 3), (3,), (), (2, 3))
        values = (torch.randn(s, generator=generator).to(d) for d, s in itertools.product(dtypes, shapes))
        params = [Parameter(v) for v in values]
        for i, p in enumerate(params):
            p.grad = None if i % 5 == 4 else torch.randn(p.shape, generator=generator).to(p.dtype)
        return params

    one, other = parameters(), parameters()
    for params, foreach in ((one, False), (other, True)):
        opt = CTROptimizer(params, foreach=foreach)
        for _ in range(3):
            opt.step()
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q)


@every_configuration
def test_without_gradients_nothing_happens(kwargs: dict[str, Any]) -> None:
    params, _ = regression()
    before = [p.detach().clone() for p in params]
    opt = build(params, kwargs)
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert not any(opt.state.values())


@every_configuration
def test_zero_gradients_move_nothing_but_by_decay(kwargs: dict[str, Any]) -> None:
    params, _ = regression()
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    build(params, kwargs).step()
    shrink = 1 - float(kwargs.get("lr", 2e-4)) * kwargs.get("weight_decay", 0.0)
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), q * shrink)


@every_configuration
def test_gradients_are_never_changed(kwargs: dict[str, Any]) -> None:
    model = net()
    opt = optimizer(model, **copy.deepcopy(kwargs))
    for step in range(3):
        opt.zero_grad()
        backward(model, batch(step))
        grads = [(p.grad, p.grad.clone()) for p in trainable(model)]
        opt.step()
        assert all(p.grad is g and torch.equal(g, old) for p, (g, old) in zip(trainable(model), grads, strict=True))


def test_zero_grad() -> None:
    params, loss, opt = trained({}, 1)
    loss()
    opt.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in params)
    opt.zero_grad()
    assert all(p.grad is None for p in params)


@every_configuration
def test_it_can_be_printed(kwargs: dict[str, Any]) -> None:
    shown = repr(trained(kwargs, 1)[2])
    assert shown.startswith("CTROptimizer (") and "lr: " in shown and "weight_decay: " in shown


@every_configuration
def test_state_is_not_empty_after_a_step(kwargs: dict[str, Any]) -> None:
    params, _, opt = trained(kwargs, 1)
    assert all({"step", "exp_avg", "exp_avg_sq"} <= opt.state[p].keys() for p in params)
