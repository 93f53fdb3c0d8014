"""Tests of the benchmark of cut adapters: one job of each kind on the bundled model, and its tables."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the benchmarks adapt models with PEFT")

from benchmarks.ranks import compress, table
from benchmarks.real.pool import Pool
from benchmarks.real.specs import Spec

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
pytestmark = pytest.mark.skipif(not (ASSETS / "base5m").exists(), reason="needs the bundled model")


def arguments(**changes: object) -> Namespace:
    given = {
        "kinds": list(compress.KINDS), "tasks": ["e2e"], "methods": ["adamw", "ctr"], "ranks": [4], "small": [2],
        "adalora": [2], "wide": 4, "tolerance": 0.01, "seeds": 1, "tolerances": [0.03],
        "converting": [0.03], "steps": 4, "batch": 2,
        "held": 8, "evaluate": 4, "adamw_lr": None, "refit": 0, **changes,
    }  # fmt: skip
    return Namespace(**given)


def test_every_kind_of_job_makes_lines_that_the_tables_show() -> None:
    worker = compress.Worker(str(ASSETS / "base5m"), ASSETS, torch.device("cpu"))
    records = []
    for job in compress.jobs_of(arguments()):
        assert compress.price(job) > 0
        records += [{**record, "job": job} for record in worker.run(job)]
    records = [json.loads(json.dumps(r)) for r in records]
    ways = {(r["job"]["kind"], r["way"]) for r in records}
    assert ways >= {("cut", w) for w in ("uncut", *table.CUTS)}
    assert ways >= {(kind, kind) for kind in compress.KINDS[1:]}
    by_way = {r["way"]: r for r in records if r["job"]["method"] == "ctr" and r["job"]["kind"] == "cut"}
    whole = by_way["uncut"]
    assert whole["rise"] == pytest.approx(0, abs=1e-6)
    assert whole["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < by_way["compress"]["held_cost"] <= 0.03
    for way in ("svd", "svd_uniform", "magnitude"):
        assert by_way[way]["parameters"] <= by_way["compress"]["parameters"] < whole["parameters"]
    text = table.report(records)
    assert all(f"| e2e | {name} |" in text for name in ("adamw", "ctr", "adalora"))


def test_jobs_are_told_apart_and_failures_are_shown() -> None:
    jobs = compress.jobs_of(arguments(seeds=2, tasks=["e2e", "mbpp"]))
    assert len({compress.key_of(job) for job in jobs}) == len(jobs) == 2 * 2 * (2 + 1 + 1 + 2 + 1)
    assert [job["kind"] for job in jobs] == sorted((j["kind"] for j in jobs), key=compress.KINDS.index)
    assert "no luck" in table.report([{"job": jobs[0], "error": "no luck"}])


def test_a_pool_may_take_specs_in_order_and_price_them_otherwise() -> None:
    def pool() -> Pool:
        return Pool(print, (), ["cpu"], 1, lambda spec, result: None, 0.0, price=lambda spec: float(spec["size"]))

    specs: list[Spec] = [{"size": 1}, {"size": 3}, {"size": 2}]
    for in_order, sizes in ((True, [1, 3, 2]), (False, [3, 2, 1])):
        some = pool()
        some._start = lambda device: None  # type: ignore[method-assign]
        assert some.work(specs, in_order) == 3  # The deadline has passed.
        assert [job.spec["size"] for job in some.waiting] == sizes
