"""CTROptimizer passes the basic checks of the torch-optimizer package.

It must find the minimum of three functions of two variables within 0.001, from (1.5, 1.5), in the number of steps that
the package's tests allow. Without LoRA layers, the checks cover the optimizer of other parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from ctr_optim import CTROptimizer


def quadratic(p: Tensor) -> Tensor:
    return p.square().sum()


def rosenbrock(p: Tensor) -> Tensor:
    """Return the Rosenbrock function with weight 1, as in the package's tests."""
    x, y = p
    return (1 - x) ** 2 + (y - x**2) ** 2


def beale(p: Tensor) -> Tensor:
    x, y = p
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


MINIMA = [(quadratic, (0.0, 0.0)), (rosenbrock, (1.0, 1.0)), (beale, (3.0, 0.5))]


@pytest.mark.parametrize("function, minimum", MINIMA, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("options", [dict(lr=0.1), dict(lr=0.1, foreach=False), dict(lr=0.1, max_kl=None)], ids=str)
def test_the_minimum_is_found(function: Callable[[Tensor], Tensor], minimum: Any, options: dict[str, Any]) -> None:
    p = Parameter(torch.tensor([1.5, 1.5]))
    opt = CTROptimizer([p], **options)
    for _ in range(800):
        opt.zero_grad()
        function(p).backward()
        opt.step()
    assert torch.allclose(p, torch.tensor(minimum), atol=1e-3)


@pytest.mark.parametrize("start", [(-1.5, -1.5), (1.5, -1.5), (-2.0, 2.0)])
def test_rosenbrock_from_elsewhere(start: tuple[float, float]) -> None:
    p = Parameter(torch.tensor(start))
    opt = CTROptimizer([p], lr=0.05)
    for _ in range(2000):
        opt.zero_grad()
        rosenbrock(p).backward()
        opt.step()
    assert torch.allclose(p, torch.ones(2), atol=1e-2)


def test_a_closure_finds_the_minimum_too() -> None:
    p = Parameter(torch.tensor([1.5, 1.5]))
    opt = CTROptimizer([p], lr=0.1)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = quadratic(p)
        loss.backward()
        return loss

    losses = [float(opt.step(closure)) for _ in range(500)]
    assert losses[-1] < 1e-6 < losses[0]
