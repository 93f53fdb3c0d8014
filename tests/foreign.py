"""CTROptimizer for torch's own optimizer test harness: its options, and a small regression problem."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from ctr_optim import CTROptimizer

pytest.importorskip("expecttest", reason="torch's test harness imports expecttest")
harness = pytest.importorskip("torch.testing._internal.common_optimizers", reason="torch without its test harness")


def inputs(device: Any, dtype: Any = None) -> list[Any]:
    """Return one set of options of every kind, in the harness's form."""
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "another lr": dict(lr=0.01),
        "tensor lr": dict(lr=torch.tensor(0.01)),
        "weight decay": dict(weight_decay=0.1),
        "maximize": dict(weight_decay=0.1, maximize=True),
        "betas": dict(betas=[0.5, 0.9], eps=1e-6),
        "no trust region": dict(max_kl=None),
        "constant bound": dict(kl_schedule="constant", calibration_interval=None),
        "no curvature": dict(curvature="none"),
    }
    return [harness.OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in options.items()]


def error_inputs(device: Any, dtype: Any) -> list[Any]:
    """Return invalid options that every optimizer or every Adam variant must reject, with CTROptimizer's messages."""
    ours = {
        "betas": (dict(betas=(1.0, 0.0)), r"betas\[0\]: got 1.0, expected a finite number"),
        "weight decay": (dict(weight_decay=-1), "weight_decay: got -1, expected"),
        "lr": (dict(lr=-1e-2), "lr: got -0.01, expected"),
        "eps": (dict(eps=-1e-8), "eps: got -1e-08, expected"),
    }
    return harness.get_error_inputs_for_all_optims(device, dtype) + [
        harness.ErrorOptimizerInput(
            harness.OptimizerInput(params=None, kwargs=kwargs, desc=desc), error_type=ValueError, error_regex=message
        )
        for desc, (kwargs, message) in ours.items()
    ]


INFO = harness.OptimizerInfo(
    CTROptimizer,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=(
        [lambda opt: torch.optim.lr_scheduler.StepLR(opt, gamma=0.99, step_size=10)],
        [lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, threshold=0)],
        [
            lambda opt: torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.4, total_iters=4),
            lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.99),
        ],
    ),
    supported_impls=("foreach",),
    supports_sparse=False,
    supports_complex=False,
)
CONFIGURATIONS = [
    pytest.param({**given.kwargs, "foreach": foreach}, id=f"{given.desc}, foreach={foreach}")
    for given in INFO.optim_inputs_func("cpu")
    for foreach in (None, False, True)
]
every_configuration = pytest.mark.parametrize("kwargs", CONFIGURATIONS)


def regression(noncontiguous: bool = False) -> tuple[list[Parameter], Any]:
    """Return a weight and a bias, and a closure that computes their loss on one input."""
    generator = torch.Generator().manual_seed(0)
    shape = (10, 5, 2) if noncontiguous else (10, 5)
    weight, bias = torch.randn(*shape, generator=generator), torch.randn(*shape[::2], generator=generator)
    if noncontiguous:
        weight, bias = weight[..., 0], bias[..., 0]
    else:
        bias = torch.randn(10, generator=generator)
    params = [Parameter(weight), Parameter(bias)]
    x = torch.randn(5, generator=generator)

    def loss() -> Tensor:
        for p in params:
            p.grad = None
        value = (params[0].mv(x) + params[1]).square().sum()
        value.backward()
        return value

    return params, loss


def build(params: Any, kwargs: dict[str, Any]) -> CTROptimizer:
    return CTROptimizer(params, **copy.deepcopy(kwargs))


def trained(kwargs: dict[str, Any], steps: int = 4, **options: Any) -> tuple[list[Parameter], Any, CTROptimizer]:
    params, loss = regression(**options)
    opt = build(params, kwargs)
    for _ in range(steps):
        loss()
        opt.step()
    return params, loss, opt
