"""Runs that ask why moving ranks gains nothing, and what could: a plan for :mod:`benchmarks.quality.run`.

    python -m benchmarks.ranks.plan > ranks.json
    python -m benchmarks.quality.run ranks.json --data DIR --models DIR --out ranks.jsonl

All of mean rank 4 at the end, seeds 0 to 2 (and uniform rank 8, what the pruned ones begin with): uniform; scheduled;
pruned from twice the rank, slowly, in one late event, or after the last step; layers dropped altogether; capacity by
kind of layer, set by hand; with and without the optimizer's state carried over.
"""

from __future__ import annotations

import json
from typing import Any

Spec = dict[str, Any]

SETTINGS: list[Spec] = [
    {"base": "base30m", "task": "e2e", "steps": 150, "batch": 32},
    {"base": "base5m", "task": "e2e", "steps": 150, "batch": 16},
    {"base": "base5m", "task": "gsm8k", "steps": 150, "batch": 16},
]
RANK = 4
SCHEDULE = {"interval": 25, "until": 0.6}
HASTY = {"interval": 10, "until": 0.9, "hysteresis": 0.0, "max_change": None}
PRUNE = {"budget": RANK, "hysteresis": 1e6}  # what exists always comes before what does not


def scheduled(steps: int) -> dict[str, tuple[int, Spec]]:
    """Rank schedules by name: the rank to begin with, and the scheduler."""
    late = {**PRUNE, "max_change": None}
    return {
        "scheduled": (RANK, SCHEDULE),
        "hasty": (RANK, HASTY),
        "pruned slowly": (2 * RANK, {**PRUNE, "gradual": True, "interval": 10, "until": 0.6}),
        "moved and pruned": (2 * RANK, {"budget": RANK, "gradual": True, "interval": 10, "until": 0.6}),
        "dropped": (2 * RANK, {**PRUNE, "gradual": True, "interval": 10, "until": 0.6, "min_rank": 0, "max_rank": 32}),
        "pruned at 0.6": (2 * RANK, {**late, "interval": round(0.6 * steps), "start": 0.6, "until": 0.6}),
        "pruned at the end": (2 * RANK, {**late, "interval": steps, "start": 1.0, "until": 1.0}),
    }


def by_kind(attention: int, mlp: int) -> Spec:
    """Ranks of attention's layers and of the others, the scaling as ever."""
    ranks = {r".*self_attn\..*": attention, r".*mlp\..*": mlp}
    return {"rank_pattern": ranks, "alpha_pattern": {k: 2 * r for k, r in ranks.items()}}


def plan() -> list[Spec]:
    """Every run."""
    specs = []
    for setting in SETTINGS:
        for seed in range(3):
            common = {**setting, "seed": seed, "rank": RANK, "method": "ctr"}
            specs += [common, {**common, "rank": 2 * RANK}]
            for rank, scheduler in scheduled(setting["steps"]).values():
                specs.append({**common, "rank": rank, "options": {"rank_scheduler": scheduler}})
            specs += [{**common, "options": {"adapter": by_kind(*ranks)}} for ranks in ((1, 6), (8, 1))]
            for scheduler in (SCHEDULE, HASTY):
                specs.append({**common, "method": "ctr_no_transport", "options": {"rank_scheduler": scheduler}})
    return specs


if __name__ == "__main__":
    print(json.dumps(plan()))
