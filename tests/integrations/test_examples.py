"""Every example runs, on a few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctr_optim.export.files import read_adapter
from ctr_optim.report.log import read_events

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*command: str) -> str:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(EXAMPLES.parent),
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300, cwd=EXAMPLES.parent
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    "name, needs", [("trainer", "peft"), ("trl_sft", "trl"), ("lightning_loop", "lightning"), ("classify", "peft")]
)
def test_an_example_with_ranks_that_move(name: str, needs: str, tmp_path: Path) -> None:
    pytest.importorskip(needs, reason=f"examples/{name}.py is about it")
    run(str(EXAMPLES / f"{name}.py"), "--out", str(tmp_path), "--steps", "6")
    events = read_events(tmp_path)
    assert any(e["event"] == "log" and e["step"] == 6 for e in events)
    last = [e for e in events if e["event"] == "log"][-1]["ranks"]
    assert {layer.name.split("model.", 1)[-1]: layer.rank for layer in read_adapter(tmp_path).layers} == {
        name.split("model.", 1)[-1]: rank for name, rank in last.items()
    }


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_distributed(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the adapter is PEFT's")
    out = run(*LAUNCHER, str(EXAMPLES / f"{name}.py"), "--out", str(tmp_path), "--steps", "3")
    assert out.count("KL from base") == 3
    assert len(read_events(tmp_path)) == 4 and read_adapter(tmp_path).layers
