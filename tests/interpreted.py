"""Tests of kernels against torch operations; ``test_fused.py`` runs them with ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import LoRALinear, optimizer, relative_error, same, snapshot, trainable
from torch import Tensor, nn

from ctr_optim import CTROptimizer
from ctr_optim.direction import fused, kernels

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set small tiles, so that a slice has several, and few slices, because the interpreter is slow."""
    monkeypatch.setattr(fused, "SLICES", 2)
    monkeypatch.setattr(fused, "TILES", {room: (16, 4) for room in fused.TILES})
    monkeypatch.setattr(fused, "_broken", False)


class Odd(nn.Module):
    """Two layers of one shape, one of another, widths that no tile size divides, and a parameter outside of layers."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twin = (LoRALinear(37, 53, rank, 2.0) for _ in range(2))
        self.last = LoRALinear(53, 19, rank, 1.0)
        self.bias = nn.Parameter(torch.zeros(19))
        for layer in (self.first, self.twin, self.last):
            nn.init.normal_(layer.lora_B.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) + self.twin(x.sin())).tanh()) + self.bias


def backward(model: nn.Module, seed: int) -> None:
    x = torch.randn(6, 37, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    model.zero_grad()
    model(x).float().square().mean().backward()


def train(model: nn.Module, opt: CTROptimizer, steps: int) -> None:
    for step in range(steps):
        backward(model, step)
        opt.step()


def start(rank: int = 4, dtype: torch.dtype = F32, **options: Any) -> tuple[nn.Module, CTROptimizer]:
    model = Odd(rank).to(dtype)
    return model, optimizer(model, **{"lr": 0.1, **options})


def twin(model: nn.Module, opt: CTROptimizer, foreach: bool | None, **options: Any) -> tuple[nn.Module, CTROptimizer]:
    """Return a copy of model and optimizer, made through a checkpoint, with another ``foreach``."""
    other = copy.deepcopy(model)
    twin = optimizer(other, **options)
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        group["foreach"] = foreach
    twin.load_state_dict(saved)
    return other, twin


def both(**options: Any) -> tuple[tuple[nn.Module, CTROptimizer], tuple[nn.Module, CTROptimizer]]:
    """Train two steps with torch operations; return a copy that continues with kernels, and the original."""
    slow = start(foreach=True, **options)
    train(*slow, 2)
    kept = {name: options[name] for name in ("rank_scheduler", "max_kl") if name in options}
    return twin(*slow, None, **kept), slow


def assert_same_state(one: CTROptimizer, other: CTROptimizer) -> None:
    """Assert a relative error up to 1e-5 of every tensor's norm; small entries may be differences of large ones."""
    for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        for key, value in other.state[q].items():
            assert (one.state[p][key] - value).norm() <= 1e-5 * value.norm(), key


def assert_same_step(
    one: tuple[nn.Module, CTROptimizer],
    other: tuple[nn.Module, CTROptimizer],
    change: Callable[[nn.Module], None] = lambda _: None,
) -> None:
    """Assert that one step on equal gradients gives equal weights and state; only the first optimizer uses kernels."""
    before = [p.detach().clone() for p in trainable(one[0])]
    for model, opt in (one, other):
        backward(model, 100)
        change(model)
        opt.step()
    assert one[1]._fused.stacks and not other[1]._fused.stacks and not fused._broken
    narrow = before[0].dtype != F32  # The interpreter truncates where the device rounds.
    for p, q, old in zip(trainable(one[0]), trainable(other[0]), before, strict=True):
        if narrow:
            torch.testing.assert_close(p, q, rtol=2 * torch.finfo(p.dtype).eps, atol=1e-6)
        else:
            assert relative_error(p.detach() - old, q.detach() - old) < 1e-5
    assert_same_state(one[1], other[1])
    got, expected = one[1].metrics(), other[1].metrics()
    for key in ("trust/predicted_kl", "trust/scale"):
        assert got[key] == pytest.approx(expected[key], rel=1e-5) and got[key] > 0
    slopes = [float(opt._trust.slope) for _, opt in (one, other)]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-4) and slopes[0] < 0


@pytest.mark.parametrize(
    "rank, dtype, options",
    [
        (1, F32, {}),
        (4, F32, {"weight_decay": 0.1, "maximize": True, "max_kl": None}),
        (16, F32, {"max_kl": 1e-4}),
        (24, F32, {"betas": (0.0, 0.9), "eps": 1e-3, "max_kl": 1e-5}),
        (4, BF16, {"weight_decay": 0.1, "max_kl": 1e-4}),
        (4, F16, {"lr": torch.tensor(0.01)}),
    ],
    ids=str,
)
def test_a_step_equals_torch(rank: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_same_step(*both(rank=rank, dtype=dtype, **options))


def test_a_checkpoint_of_either_path_is_one_of_the_other() -> None:
    fast, slow = both(max_kl=1e-3)
    assert_same_step(fast, slow)
    assert_same_step(fast, twin(*fast, True, max_kl=1e-3))


def test_a_step_after_a_rank_event() -> None:
    one, two = both(rank_scheduler={"interval": 2, "hysteresis": 0.0, "total_steps": 100}, max_kl=1e-3)
    assert len({pair.rank for pair in one[1].pairs}) > 1
    assert_same_step(one, two)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    one, two = both(weight_decay=0.1)
    before = snapshot(one[0])
    for model, opt in (one, two):
        backward(model, 2)
        opt.blocks[0].pairs[-1].B.grad[-1, -1] = bad
        with pytest.warns(UserWarning, match="skipped a step"):
            opt.step()
        assert same(snapshot(model), before)
    assert one[1]._fused.stacks
    assert_same_state(one[1], two[1])
    assert all(state["step"] == 2 for state in one[1].state.values())


def misalign(model: nn.Module) -> None:
    """Place all gradients in one buffer, as DDP's buckets do."""
    grads = [p.grad for p in trainable(model)]
    flat = torch.cat([torch.zeros(1), *[g.flatten() for g in grads]])
    for p, part in zip(trainable(model), flat[1:].split([g.numel() for g in grads]), strict=True):
        p.grad = part.view_as(p)


def test_gradients_anywhere_in_memory() -> None:
    assert_same_step(*both(max_kl=1e-3), misalign)


def without(model: nn.Module) -> None:
    model.twin.lora_A.weight.grad = None


def transposed(model: nn.Module) -> None:
    p = model.twin.lora_A.weight
    p.grad = p.grad.mT.contiguous().mT


@pytest.mark.parametrize("change", [without, transposed])
def test_what_kernels_cannot_take_is_left_to_torch(change: Callable[[nn.Module], None]) -> None:
    one, two = both(max_kl=1e-3)
    for model, opt in (one, two):
        backward(model, 2)
        change(model)
        assert opt._fused.look() is None
        opt.step()
    assert same(snapshot(one[0]), snapshot(two[0]))


@pytest.mark.parametrize(
    "name, after", [("find_infinite", 0), ("find_direction", 0), ("find_direction", 3), ("move", 1)]
)
def test_a_kernel_that_fails_leaves_the_step_to_torch(name: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = both(max_kl=1e-3)
    calls, kernel = [], getattr(kernels, name)

    class Fails:
        def __getitem__(self, grid: Any) -> Any:
            calls.append(grid)
            if len(calls) > after:
                raise RuntimeError("no compiler")
            return kernel[grid]

    monkeypatch.setattr(kernels, name, Fails())
    for model, _ in (one, two):
        backward(model, 2)
    with pytest.warns(UserWarning, match="no compiler.*foreach=True"):
        one[1].step()
    two[1].step()
    for p, q in zip(trainable(one[0]), trainable(two[0]), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert_same_state(one[1], two[1])
    train(*one, 2)  # Later steps do not try the kernels again.
    assert len(calls) == after + 1
