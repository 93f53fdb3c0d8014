"""Tests of the retention benchmark: variants that alternate on one model do not influence each other."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the benchmarks adapt models with PEFT")
pytest.importorskip("transformers", reason="the model is transformers'")

from benchmarks.performance import retention_cost
from benchmarks.performance.bench import build
from benchmarks.performance.common import Report

CPU = torch.device("cpu")


def test_variants_go_on_from_their_own_weights(tmp_path: Path) -> None:
    args = Namespace(
        shape="tiny", model=None, precision="float32", rank=2, batch=2, length=16, checkpointing=False
    )  # fmt: skip
    out = tmp_path / "lines.jsonl"
    bench = build(args, Report(str(out), CPU), CPU)
    every = retention_cost.variants(bench, ["ctr", "retain", "budget"], tokens=512, budget=0.5, repeats=1)
    start = [p.detach().clone() for p in bench.params]
    retention_cost.interleaved(bench, every, rounds=2, steps=2, deadline=float("inf"))
    assert all(len(v.rounds) == 2 for v in every.values())
    ends = {name: v.start for name, v in every.items()}
    names = list(ends)
    for i, one in enumerate(names):
        for other in [start, *(ends[name] for name in names[i + 1 :])]:
            assert any(not torch.equal(a, b) for a, b in zip(ends[one], other, strict=True))
    retention_cost.add_lines(bench.report, every)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    by_name = {line["name"]: line for line in lines if line["what"] == "variant"}
    assert list(by_name) == names
    assert by_name["budget"]["metrics"]["budget/limit"] == 0.5
    assert by_name["retain"]["state_bytes"] > by_name["ctr"]["state_bytes"]
    assert next(line for line in lines if line["what"] == "retention")["tokens"] == 512


def test_no_round_is_begun_too_late() -> None:
    args = Namespace(
        shape="tiny", model=None, precision="float32", rank=2, batch=2, length=16, checkpointing=False
    )  # fmt: skip
    bench = build(args, Report(None, CPU), CPU)
    every = retention_cost.variants(bench, ["ctr"], tokens=512, budget=0.5, repeats=1)
    retention_cost.interleaved(bench, every, rounds=3, steps=1, deadline=0.0)
    assert len(every["ctr"].rounds) == 1  # The first round always runs.
