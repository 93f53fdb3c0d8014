"""A few hundred steps of the long run (``benchmarks/trust``), with the checks of the full run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if not (ROOT / "benchmarks" / "trust").is_dir():
        pytest.skip("benchmarks/ is missing: the source distribution does not contain it")
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.trust.long_run import run
    finally:
        sys.path.remove(str(ROOT))
    return run(steps=240, every=60, interval=12)


def test_there_was_something_to_see(found: dict[str, Any]) -> None:
    assert found["steps"] == 240 and found["rank_events"] == 20
    assert found["reasons"]["grow"] > 5 and found["reasons"]["shrink"] > 5
    assert found["loss"][1] < found["loss"][0]
    assert found["skipped_steps"] == found["failed_decompositions"] == 0


def test_no_step_leaves_the_trust_region(found: dict[str, Any]) -> None:
    assert found["violations"] == 0 and found["steps_shortened"] > 5
    assert 0.99 < found["worst"]["predicted KL / bound"] <= 1 + 1e-4
    assert found["worst"]["predicted KL from the weights / bound"] <= 1 + 1e-4


def test_the_budget_holds(found: dict[str, Any]) -> None:
    assert found["worst"]["parameters / budget"] <= 1


@pytest.mark.parametrize("factor", ["input_diagonal", "output_diagonal", "rank_input", "rank_output"])
def test_factors_do_not_drift(found: dict[str, Any], factor: str) -> None:
    assert found["worst"][f"factor drift, {factor}"] < 1e-5


def test_events_carry_everything_over(found: dict[str, Any]) -> None:
    assert found["worst"]["change of the function by growth"] <= 1e-5
    assert found["worst"]["energy of the kept directions, relative error"] < 1e-5
    assert found["worst"]["orthonormality of transported bases"] < 1e-5
    assert found["worst"]["orthonormality of bases"] < 1e-5


def test_memory_is_flat(found: dict[str, Any]) -> None:
    first, last = found["memory"][1], found["memory"][-1]
    assert last["hooks"] == first["hooks"]
    assert last["objects"] - first["objects"] < 500
    assert last["tensors"] - first["tensors"] < 80  # Sketches and ranks change over time.
    assert last["tensor_bytes"] < 1.05 * first["tensor_bytes"]
