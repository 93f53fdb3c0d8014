"""Tests of the real-model benchmarks' plans, tables and pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="the benchmarks adapt models with PEFT")

from benchmarks.real import peers, plans, plot, report, specs
from benchmarks.real.methods import METHODS
from benchmarks.real.run import read


@pytest.mark.parametrize("name", list(plans.PLANS))
def test_plans_hold_known_runs_once_long_ones_first(name: str) -> None:
    plan = plans.ordered(plans.PLANS[name]())
    assert plan
    assert {specs.complete(s)["method"] for s in plan} <= set(METHODS)
    costs = [specs.cost(s) for s in plan]
    assert costs == sorted(costs, reverse=True)
    assert len({specs.key_of(s) for s in plan}) == len(plan)


def test_the_cells_are_even_and_fixed() -> None:
    cells = [tuple(cell[k] for k in plans.FACTORS) for cell in plans.cells()]
    assert len(cells) == plans.CELLS
    assert [tuple(cell[k] for k in plans.FACTORS) for cell in plans.cells()] == cells
    for index, levels in enumerate(plans.FACTORS.values()):
        counts = [sum(cell[index] == level for cell in cells) for level in levels]
        assert max(counts) - min(counts) <= 1
    for one, two in (("task", "batch"), ("task", "rows"), ("steps", "schedule"), ("steps", "batch")):
        i, j = list(plans.FACTORS).index(one), list(plans.FACTORS).index(two)
        for a in plans.FACTORS[one]:
            counts = [sum((c[i], c[j]) == (a, b) for c in cells) for b in plans.FACTORS[two]]
            assert max(counts) - min(counts) <= 2


def test_a_part_of_a_plan() -> None:
    part = plans.select(plans.auto(), ["steps=50,200", "task=e2e"])
    assert part and all(specs.complete(s)["steps"] in (50, 200) and s["task"] == "e2e" for s in part)
    with pytest.raises(SystemExit, match="expected KEY=VALUE"):
        plans.select([], ["nothing=1"])


def record(loss: float, validation: float | None = None, **spec: Any) -> dict[str, Any]:
    whole = specs.complete({"task": "e2e", "domains": [], **spec})
    return {"spec": whole, "loss": loss, "validation": loss if validation is None else validation, "text": 3.0 + loss,
            "seconds": 1.0, "domains": {"mbpp": 2 * loss}, "score": {"accuracy": loss / 4}}  # fmt: skip


def lines() -> list[dict[str, Any]]:
    """Return records with a base loss of 2.0 and two seeds; AdamW's best rate is 4e-4 by validation, 8e-4 by test."""
    found = [record(2.0, method="adamw", lr=2e-4, steps=0)]
    for seed in (0, 1):
        shift = 0.01 * seed
        found.append(record(0.9 + shift, method="ctr", seed=seed))
        for lr, loss, validation in ((2e-4, 1.2, 1.2), (4e-4, 1.1, 1.0), (8e-4, 1.05, 1.3)):
            found.append(record(loss + shift, validation, method="adamw", lr=lr, seed=seed))
        found.append(record(1.15 + shift, method="dora", lr=4e-4, seed=seed))
    found.append({"spec": specs.complete({"method": "soap", "lr": 1.0}), "error": "diverged"})
    return found


def test_rates_are_chosen_by_validation_and_differences_are_paired() -> None:
    pytest.importorskip("scipy", reason="the intervals' quantiles come from scipy")
    text = report.report(lines())
    assert "| adamw 0.0004 | 1.1050 | 0.0071 | 2 |  | 1.0000 | -0.895 |" in text
    assert "| CTROptimizer | 0.9050 | 0.0071 | 2 | -0.2000 ± 0.0000 |" in text
    assert "adamw 0.0008 |" not in text
    assert "0.0008: 1.055" in text  # in the table of rates
    assert "- soap: diverged" in text
    assert "-18.1 %" in text  # of the default from AdamW


def test_grids_go_on_at_their_edge_and_the_best_rates_get_seeds() -> None:
    records = [record(1.0, 3.0 - i, method="adamw", lr=lr) for i, lr in enumerate((1e-4, 2e-4))]
    records += [record(1.0, math.nan, method="dora", lr=1e-3), record(1.0, 2.0, method="dora", lr=2e-3)]
    records += [record(1.0, 5.0, method="dora", lr=4e-3), record(1.0, method="ctr")]
    assert sorted(s["lr"] for s in plans.extend(records)) == [4e-4, 8e-4]
    chosen = {(s["method"], s["lr"], s["seed"]) for s in plans.final(records, [5, 6])}
    expected = {("adamw", 2e-4), ("dora", 2e-3), ("ctr", None)}
    assert chosen == {(*pair, seed) for pair in expected for seed in (5, 6)}


def test_the_outer_edge_of_a_pareto_picture() -> None:
    assert plot.edge([(2, 1), (1, 2), (2, 3), (3, 1), (0, 4)]) == [(0, 4), (1, 2), (2, 1)]


def test_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = lines()
    for batch in (4, 64):
        records += [record(0.8, method="ctr", batch=batch), record(0.9, method="adamw", lr=2e-4, batch=batch)]
    monkeypatch.setattr(plot, "read", lambda _: records)
    plot.main(["lines.jsonl", "--out", str(tmp_path)])
    names = {"real-pareto-e2e.png", "real-lr-e2e.png", "real-batch-e2e.png"}
    assert {f.name for f in tmp_path.iterdir()} == names


FINISHED = ("cells", "few-rows", "real", "real-default", "retention-peers")  # results before the plan was made


def test_peers_leaves_finished_runs_out_and_starts_with_each_methods_best_guess() -> None:
    """Only the default repeats finished runs, as the reference of today's version."""
    plan = [specs.complete(s) for s in plans.peers()]
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    lines = read(results / f"{name}-h200.jsonl" for name in FINISHED)
    finished = {specs.key_of(r["spec"]) for r in lines if "error" not in r}
    repeated = {s["method"] for s in plan if specs.key_of(s) in finished}
    assert repeated == {"ctr"}
    others = [s for s in plan if s["method"] not in ("ctr", "adamw")]
    first = others[: 2 * len(peers.RATES)]
    assert [(s["task"], s["method"], s["lr"]) for s in first] == [
        (task, method, rates[0]) for method, rates in peers.RATES.items() for task in ("e2e", "gsm8k")
    ]
    assert len(others) == 6 * len(peers.RATES)
    adamw = {(s["task"], s["lr"]) for s in [*plan, *(r["spec"] for r in lines)] if is_full_run(s, "adamw")}
    assert {(task, lr) for task in ("e2e", "gsm8k") for lr in (2e-4, 8e-4, 3.2e-3)} <= adamw


def is_full_run(spec: dict[str, Any], method: str) -> bool:
    """Whether a run has the setting of ``peers`` except for its method and rate."""
    setting = plans.setting(spec["task"])
    return specs.key_of({**setting, "method": method, "lr": spec["lr"]}) == specs.key_of(spec)
