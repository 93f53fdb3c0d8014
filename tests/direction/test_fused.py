"""The Triton kernels in Triton's interpreter on the CPU, in a process that sets TRITON_INTERPRET before it starts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import net, optimizer, train

HERE = Path(__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py")]
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_cpus_are_left_to_torch() -> None:
    model = net(dtype=torch.float32)
    opt = optimizer(model)
    train(model, opt, 1)
    assert not opt._fused.stacks
