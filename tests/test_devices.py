"""What the user chose for the model's products, autocast or TF32, is not for the optimizer's own."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
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


def trained(autocast: bool, options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Weights, state and metrics after some steps, each within autocast or not."""
    options = dict(options)
    model = net(dtype=torch.float32, dropout=options.pop("dropout", 0.0))
    opt = optimizer(model, lr=0.05, weight_decay=0.1, max_kl=1e-2, factor_interval=2, **options)
    torch.manual_seed(1)
    for step in range(9):
        opt.zero_grad()
        backward(model, batch(step))
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            opt.step()
    return [*model.parameters(), *(t for state in opt.state.values() for t in state.values())], opt.metrics()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_within_autocast_is_the_same_step(name: str) -> None:
    (plain, told), (within, said) = (trained(autocast, OPTIONS[name]) for autocast in (False, True))
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
        # what transformers does for tf32=True
        pytest.param("setattr(torch.backends, 'fp32_precision', 'tf32')", marks=NEW),
        pytest.param("setattr(torch.backends, 'fp32_precision', 'ieee')", marks=NEW),
    ],
)
def test_tf32_is_off_for_a_while_however_it_was_asked_for(asked: str) -> None:
    """In a process of its own: torch's two switches do not go together. They work without a GPU, too."""
    code = f"""
import torch
from ctr_optim.devices import exact

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
