"""Every example runs for a few steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ctr_optim.export.files import read_adapter
from ctr_optim.report import read_run
from ctr_optim.report.log import read_events

EXAMPLES = Path(__file__).parents[2] / "examples"
AS_ADAMW = str(Path(__file__).parents[1] / "as_adamw.py")


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


TRAINING = [("trainer", "peft"), ("trl_sft", "trl"), ("lightning_loop", "lightning"), ("classify", "peft")]


@pytest.mark.parametrize("name, needs", TRAINING)
def test_an_example_with_ranks_that_move(name: str, needs: str, tmp_path: Path) -> None:
    pytest.importorskip(needs, reason=f"examples/{name}.py is about it")
    run(str(EXAMPLES / f"{name}.py"), "--out", str(tmp_path), "--steps", "6", "--ranks")
    events = read_events(tmp_path)
    assert any(e["event"] == "log" and e["step"] == 6 for e in events)
    last = [e for e in events if e["event"] == "log"][-1]["ranks"]
    assert {layer.name.split("model.", 1)[-1]: layer.rank for layer in read_adapter(tmp_path).layers} == {
        name.split("model.", 1)[-1]: rank for name, rank in last.items()
    }


@pytest.mark.parametrize("name, needs", TRAINING)
def test_an_example_ends_better_than_adamw_at_its_everyday_rate(name: str, needs: str, tmp_path: Path) -> None:
    """Both optimizers run the same script, steps and batches, with fixed ranks."""
    pytest.importorskip(needs, reason=f"examples/{name}.py is about it")
    script, steps = str(EXAMPLES / f"{name}.py"), ("--steps", "15")
    run(script, "--out", str(tmp_path / "ours"), *steps)
    run(AS_ADAMW, script, "--out", str(tmp_path / "adamw"), *steps)
    ours, adamw = (read_run(tmp_path / folder) for folder in ("ours", "adamw"))
    assert not ours.event_steps and ours.series("loss")[0] == adamw.series("loss")[0]
    ends = [sum(found.series("loss")[1][-4:]) / 4 for found in (ours, adamw)]
    assert ends[0] < ends[1]


def test_the_plain_loop_ends_better_than_adamw_at_its_everyday_rate() -> None:
    pytest.importorskip("peft", reason="the adapter is PEFT's")
    script = str(EXAMPLES / "plain_loop.py")
    ours, adamw = (re.findall(r"loss ([\d.]+)", run(*command)) for command in ((script,), (AS_ADAMW, script)))
    assert len(ours) == 20 and ours[0] == adamw[0]
    assert sum(map(float, ours[-4:])) < sum(map(float, adamw[-4:]))


def test_the_demo(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the adapter is PEFT's")
    pytest.importorskip("matplotlib", reason="it draws")
    pytest.importorskip("rich", reason="it shows tables")
    short = ("--steps", "2", "--evaluations", "1", "--test-rows", "4", "--samples", "1", "--sample-length", "3")
    out = run(str(EXAMPLES / "finetune.py"), "--out", str(tmp_path), "--title", "a title", *short)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in result["runs"]] == 3 * ["AdamW"] + 3 * ["CTR"]
    assert all(len(one["train_loss"]) == 2 and "2" in one["test_loss"] for one in result["runs"])
    assert len({one["train_loss"][0] for one in result["runs"]}) == 1  # all runs start with the same weights and batch
    assert "a title" in out and "4 test rows" in out and "forgetting" in out and "not tuned" not in out
    assert (tmp_path / "loss.png").is_file() and read_adapter(tmp_path / "adapter").layers


def test_the_demo_says_where_a_model_has_no_layers_for_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the adapter is PEFT's")
    pytest.importorskip("rich", reason="it shows tables")
    command = [sys.executable, str(EXAMPLES / "finetune.py"), "--out", str(tmp_path), "--targets", "nothing"]
    done = subprocess.run(
        [*command, "--test-rows", "2", "--samples", "0"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(EXAMPLES.parent)},
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "found no layers for LoRA" in done.stderr and "Linear" in done.stderr and "--targets" in done.stderr


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_distributed(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the adapter is PEFT's")
    out = run(*LAUNCHER, str(EXAMPLES / f"{name}.py"), "--out", str(tmp_path), "--steps", "3")
    assert out.count("KL from base") == 3
    assert len(read_events(tmp_path)) == 4 and read_adapter(tmp_path).layers
