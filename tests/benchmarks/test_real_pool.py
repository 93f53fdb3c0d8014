"""Tests of the real-model benchmarks' processes: order, time limit, deaths, memory, resuming."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from real_processes import entry

pytest.importorskip("peft", reason="the benchmarks adapt models with PEFT")

from benchmarks.real import run, specs
from benchmarks.real.pool import Pace, Pool

BASE5M = Path(__file__).resolve().parents[2] / "examples" / "assets" / "base5m"


def pool(folder: Path, each: int = 1, deadline: float = math.inf, **more: Any) -> tuple[Pool, list[tuple[Any, Any]]]:
    written: list[tuple[Any, Any]] = []
    add = lambda spec, result: written.append((spec, result))  # noqa: E731
    return Pool(entry, (str(folder),), ["cpu"], each, add, deadline, say=lambda text: None, **more), written


def spec(task: str, seed: int = 0, steps: int = 10) -> specs.Spec:
    return specs.complete({"task": task, "seed": seed, "steps": steps})


def test_long_runs_come_first_and_deaths_and_memory_stop_nothing(tmp_path: Path) -> None:
    work, written = pool(tmp_path)
    plan = [spec("works", steps=10), spec("memory", steps=20), spec("dies", steps=40), spec("dies once", steps=30)]
    assert work.work([*plan, spec("works", 1, steps=50), spec("last", steps=15)]) == 0
    results = {(s["task"], s["seed"]): r for s, r in written}
    assert len(written) == len(results) == 6
    assert (written[0][0]["task"], written[0][0]["seed"]) == ("works", 1)
    assert results["works", 0] == {"loss": 0.0}
    assert results["dies once", 0] == {"loss": 1.0}
    assert results["memory", 0] == {"loss": 2.0}  # the third attempt
    assert "died 2 times, last with exit code 7" in results["dies", 0]["error"]


def test_a_run_that_would_not_end_in_time_is_not_begun(tmp_path: Path) -> None:
    short, long = spec("works", steps=10), spec("works", 1, steps=100_000)
    pace = Pace(60 / specs.cost(long))
    work, written = pool(tmp_path, deadline=time.time() + 50, pace=pace)
    assert work.work([short, long]) == 1
    assert [s["seed"] for s, _ in written] == [0]
    work, written = pool(tmp_path, deadline=time.time() - 1)
    assert work.work([short]) == 1
    assert not written


def test_the_pace_is_near_the_slowest_seen() -> None:
    pace = Pace(5.0)
    pace.add(1.0, 2.0)
    assert pace.value == 5.0  # One run is too few to lower the guess.
    for seconds in range(2, 21):
        pace.add(seconds, 2.0)
    assert pace.value == 9.5


@pytest.mark.skipif(not (BASE5M / "model.safetensors").exists(), reason=f"{BASE5M} does not exist")
def test_a_plan_is_worked_off_and_then_there_is_nothing_to_do(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "lines.jsonl")
    small = {"steps": 1, "batch": 2, "rank": 2, "alpha": 4, "evaluate": 4, "held": 4, "domains": [], "text": None}
    plan = [{**small, "method": "ctr"}, {**small, "method": "no such"}]
    left = run.work(plan, str(BASE5M.parent), str(BASE5M), out, ["cpu"], 1)
    assert left == 0
    records = {r["spec"]["method"]: r for r in run.read([out])}
    assert math.isfinite(records["ctr"]["loss"])
    assert records["ctr"]["versions"]["processes"] == 1
    assert "expected one of" in records["no such"]["error"]
    run.work(plan, str(BASE5M.parent), str(BASE5M), out, ["cpu"], 1)
    assert "0 of 2 runs to do" in capfd.readouterr().out
    assert len(Path(out).read_text().splitlines()) == 2
    assert all(json.loads(line) for line in Path(out).read_text().splitlines())


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 4)
    assert run.devices_of("all") == [f"cuda:{i}" for i in range(4)]
    assert run.devices_of("2") == ["cuda:0", "cuda:1"]
    assert run.devices_of("1,3") == ["cuda:1", "cuda:3"]
    assert run.devices_of("none") == ["cpu"]
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 0)
    assert run.devices_of("all") == ["cpu"]
