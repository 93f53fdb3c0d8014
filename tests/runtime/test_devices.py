"""The user's autocast, TF32, default device and default dtype do not affect the optimizer's own tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support import backward, batch, net, optimizer
from torch import Tensor

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "dropout, so that measurements run the model twice": {"dropout": 0.2},
    "penalty": {"trust_penalty": 0.1},
    "low rank": {"factor_structure": "lowrank"},
    "ranks that move": {"rank_scheduler": dict(interval=4, window=2, hysteresis=0.0, absent="sketch")},
    "masked": {"rank_scheduler": dict(interval=4, window=2, hysteresis=0.0), "resize": "masked"},
    "no curvature": {"curvature": "none"},
}


def trained(around: Callable[[], Any], options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Return weights, state and metrics after some steps; all calls of the optimizer run inside of ``around``."""
    options, measured = dict(options), dict(calibration_interval=2)
    model = net(dtype=torch.float32, dropout=options.pop("dropout", 0.0))
    with around():
        opt = optimizer(model, lr=0.05, weight_decay=0.1, max_kl=1e-2, factor_interval=2, **measured | options)
    torch.manual_seed(1)
    for step in range(9):
        opt.zero_grad()
        backward(model, batch(step))
        with around():
            opt.step()
            if step == 5:
                opt.load_state_dict(opt.state_dict())
    with around():
        return [*model.parameters(), *(t for state in opt.state.values() for t in state.values())], opt.metrics()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype for a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_on_around_the_optimizer_is_not_for_its_own_tensors(name: str, around: str) -> None:
    """``meta`` replaces a GPU as default device: tensors that are created there by mistake raise errors."""
    (plain, told), (within, said) = (trained(context, OPTIONS[name]) for context in (nullcontext, AROUND[around]))
    assert all(torch.equal(a, b) for a, b in zip(plain, within, strict=True))
    assert told == said


NEW = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has only the older switch")


@pytest.mark.parametrize(
    "asked",
    [
        "None",
        "torch.set_float32_matmul_precision('high')",
        "setattr(torch.backends.cuda.matmul, 'allow_tf32', True)",
        pytest.param("setattr(torch.backends.cuda.matmul, 'fp32_precision', 'tf32')", marks=NEW),
        # as transformers does for tf32=True
        pytest.param("setattr(torch.backends, 'fp32_precision', 'tf32')", marks=NEW),
        pytest.param("setattr(torch.backends, 'fp32_precision', 'ieee')", marks=NEW),
    ],
)
def test_tf32_is_off_for_a_while_however_it_was_asked_for(asked: str) -> None:
    """Runs in a new process, since torch does not allow to mix its two TF32 options. They work without a GPU, too."""
    code = f"""
import torch
from ctr_optim.runtime.devices import exact

def tf32():
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"

{asked}
before = tf32()
assert before == ({asked!r} != "None" and "ieee" not in {asked!r})
with exact([torch.device("cuda"), torch.device("cpu")]):
    assert not tf32()
assert tf32() == before
try:
    with exact([torch.device("cuda")]):
        raise KeyError
except KeyError:
    assert tf32() == before
with exact([torch.device("cpu")]):  # no business of ours
    assert tf32() == before
if "'high'" in {asked!r}:
    assert torch.get_float32_matmul_precision() == "high"
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
