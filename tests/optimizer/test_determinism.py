"""On the CPU, the same seed gives bit-identical weights, state, metrics and rank events."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import backward, batch, net, optimizer, trainable

OPTIONS: dict[str, Any] = dict(
    lr=0.05, weight_decay=0.1, max_kl=1e-3, factor_interval=3, basis_interval=4, calibration_interval=2
)
RANKS = dict(interval=4, window=2, hysteresis=0.0, absent="sketch")


def fingerprint(structure: str = "diagonal", steps: int = 13, dtype: torch.dtype = torch.float32) -> str:
    """Return a hash of a run's results; the run has dropout, rank events and measurements of the coupling."""
    model = net(seed=3, dtype=dtype, dropout=0.2)
    opt = optimizer(model, rank_scheduler=RANKS, factor_structure=structure, **OPTIONS)
    events: list[Any] = []
    opt.on_rank_event(events.append)
    torch.manual_seed(7)
    for step in range(steps):
        opt.zero_grad()
        backward(model, batch(step))
        opt.step()
    digest = hashlib.sha256(repr((events, opt.metrics(), opt.state_dict()["param_groups"][0]["ctr"])).encode())
    for p in trainable(model):
        for _, tensor in [("", p.detach()), *sorted(opt.state[p].items())]:
            digest.update(tensor.double().numpy().tobytes())
    assert events
    return digest.hexdigest()


@pytest.mark.parametrize("structure", ["diagonal", "lowrank", "dense"])
def test_the_same_seed_gives_the_same_bits(structure: str) -> None:
    assert fingerprint(structure) == fingerprint(structure)


def test_another_process_gives_the_same_bits() -> None:
    """The process has another hash seed, so the order of sets of strings must not matter."""
    code = "import test_determinism as t, torch; torch.set_num_threads(1); print(t.fingerprint())"
    paths = [str(path) for path in Path(__file__).resolve().parents[:3]]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == fingerprint()


@pytest.mark.parametrize("options", [dict(), dict(rank_scheduler=RANKS), dict(curvature="none")], ids=str)
def test_the_random_state_is_left_alone(options: dict[str, Any]) -> None:
    """A run with CTROptimizer draws the same dropout masks as one without."""
    model = net(dropout=0.5)
    opt = optimizer(model, calibration_interval=1, **options)
    for step in range(6):
        opt.zero_grad()
        backward(model, batch(step))
        before = torch.get_rng_state()
        opt.step()
        opt.metrics()
        opt.load_state_dict(opt.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
