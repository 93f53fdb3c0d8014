"""Plans for the tables: which runs, with which settings.

    python -m benchmarks.quality.plans ranks tune > tune.json
    python -m benchmarks.quality.plans ranks final --tuned tune.jsonl > final.json
    python -m benchmarks.quality.plans robustness final > robustness.json

Peers get their own best learning rate from a grid (validation loss, a seed of its own, mean rank 4); CTR
runs at its defaults.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

SETTINGS = [
    {"base": "base30m", "task": "e2e", "steps": 150, "batch": 32},
    {"base": "base5m", "task": "gsm8k", "steps": 150, "batch": 16},
    {"base": "base5m", "task": "boolq", "steps": 150, "batch": 16, "evaluate": 1500},
]
PEERS = ["adamw", "eva"]
GRID = [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
TUNING_SEED = 100
SCHEDULE = {"interval": 25, "until": 0.6}
CTR: list[dict[str, Any]] = [{}, {"rank_scheduler": SCHEDULE}, {"initialize": {}}]


def ranks(tuned: dict[str, float]) -> list[dict[str, Any]]:
    """Uniform, scheduled and initialized ranks against peers, at mean rank 2, 4 and 8; five seeds."""
    plan = []
    for setting in SETTINGS:
        for rank in (4,) if setting["task"] == "boolq" else (2, 4, 8):
            for seed in range(5):
                common = {**setting, "rank": rank, "seed": seed}
                plan += [{**common, "method": "ctr", "options": options} for options in CTR]
                plan += [{**common, "method": peer, "lr": tuned.get(peer + setting["task"], 8e-3)} for peer in PEERS]
    e2e = SETTINGS[0]
    for lr in (8e-3, 3.2e-2):  # three times as slow as the rest: fewer runs
        plan += [{**e2e, "rank": 4, "seed": seed, "method": "adalora", "lr": lr} for seed in range(2)]
    return plan


def ranks_tuning() -> list[dict[str, Any]]:
    """The grid of every peer."""
    return [
        {**setting, "rank": 4, "seed": TUNING_SEED, "method": peer, "lr": lr}
        for setting in SETTINGS
        for peer in PEERS
        for lr in GRID
    ]


def robustness(tuned: dict[str, float]) -> list[dict[str, Any]]:
    """base5m on E2E: the loss over learning rates, a factor of 256 apart for CTR; three seeds."""
    common = {"base": "base5m", "task": "e2e", "steps": 150, "batch": 16}
    plan = []
    for seed in range(3):
        plan += [{**common, "seed": seed, "method": "adamw", "lr": lr} for lr in [1e-3, *GRID, 8e-2]]
        plan += [{**common, "seed": seed, "method": "ctr", "lr": 2e-2 * factor} for factor in (0.25, 1, 4, 16, 64)]
        for max_kl in (1.25e-2, 2.5e-2, 0.1):
            plan.append({**common, "seed": seed, "method": "ctr", "lr": 2e-2, "options": {"max_kl": max_kl}})
        for options in ({"max_kl": None, "calibration_interval": None}, {"kl_schedule": "constant"}):
            plan.append({**common, "seed": seed, "method": "ctr", "lr": 4e-3, "options": options})
    return plan


def best_rates(results: str) -> dict[str, float]:
    """The best learning rate of each method and task in a tuning file."""
    best: dict[str, tuple[float, float]] = {}
    with open(results) as lines:
        for record in map(json.loads, lines):
            if "loss" not in record:
                continue
            spec = record["spec"]
            key = spec["method"] + spec["task"]
            best[key] = min(best.get(key, (float("inf"), 0.0)), (record["loss"], spec["lr"]))
    return {key: rate for key, (_, rate) in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=["ranks", "robustness"])
    parser.add_argument("phase", choices=["tune", "final"])
    parser.add_argument("--tuned")
    args = parser.parse_args()
    tuned = best_rates(args.tuned) if args.tuned else {}
    tables = {"ranks": ranks, "robustness": robustness}
    plan = ranks_tuning() if args.phase == "tune" else tables[args.table](tuned)
    print(json.dumps(plan))


if __name__ == "__main__":
    main()
