"""Pieces of plans: a task's setting, its untrained model, a method at several rates, fixed bounds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.real.specs import Spec

GENERATIVE = ["e2e", "gsm8k", "mbpp"]
CHOICE = ["boolq", "sst2", "hellaswag", "arc_easy"]
RATES = [1e-4 * 2**i for i in range(6)]  # 1e-4 to 3.2e-3
MIDDLE = RATES[1:6]
BOUNDS = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3]
EVERYDAY = 2e-4  # the rate that most users of AdamW choose
SCHEDULES = ["cosine", "linear", "constant"]
UNIT = 0.4 / 9  # seconds of one H200 per unit of cost: each of nine processes takes 0.4 (results/real-h200.jsonl)


def setting(task: str, **changes: Any) -> Spec:
    """Return the spec of a task with its number of validation rows and the scores that suit the task."""
    choice = task not in GENERATIVE
    return {
        "task": task, "held": 48 if task == "mbpp" else 200,
        "score": ["accuracy", "kl_from_base"] if choice else ["kl_from_base"], **changes,
    }  # fmt: skip


def untrained(spec: Spec) -> Spec:
    """Return the spec that measures the untrained base model in the same way as ``spec``."""
    kept = {k: v for k, v in spec.items() if k not in ("steps", "batch", "schedule", "rows", "curve")}
    return {**kept, "method": "adamw", "lr": EVERYDAY, "steps": 0}


def peer(spec: Spec, method: str, rates: Iterable[float] = RATES, **changes: Any) -> list[Spec]:
    """Return the specs of a method at several learning rates."""
    return [{**spec, "method": method, "lr": rate, **changes} for rate in rates]


def bounds(spec: Spec, values: Iterable[float] = BOUNDS) -> list[Spec]:
    """Return the specs of CTROptimizer at fixed bounds, which follow the learning rate's schedule."""
    return [{**spec, "options": {"max_kl": value, "kl_schedule": "lr"}} for value in values]
