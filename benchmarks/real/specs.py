"""Specification of a run: its keys with defaults, its identity and its estimated cost."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.specs import completed

Spec = dict[str, Any]

WIKITEXT: Spec = {"task": "wikitext2", "split": "valid", "pieces": 64, "length": 256}
"""Retained text for ``retain`` and for the other methods: WikiText-2's validation split."""

DEFAULTS: Spec = {
    "method": "ctr", "task": "e2e", "sequence": None, "lr": None, "options": {}, "retain": None, "kl_budget": None,
    "holdout": 0, "rank": 16, "alpha": 32, "steps": 200, "batch": 16, "schedule": "cosine", "rows": None, "held": 200,
    "seed": 0, "evaluate": 400, "max_length": 256, "curve": 0, "domains": ["mbpp", "gsm8k"],
    "text": {"task": "wikitext2", "split": "test", "pieces": 64, "length": 256}, "score": [], "dtype": "float32",
}  # fmt: skip
"""
method      one of :data:`benchmarks.real.methods.METHODS`
lr          learning rate of the method; None: its default
options     keyword arguments of the method's optimizer
task        folder of ``train.jsonl`` and ``test.jsonl``
sequence    several tasks instead of ``task``, trained in this order with one adapter and one optimizer, ``steps`` each;
            every task is tested after each of them
retain      text whose predictions should stay: None (the method's default), ``"none"``, ``"self"``, or
            ``{"task", "split", "pieces", "length"}``; passed to ``CTROptimizer(retain=)`` and to the other methods
kl_budget   passed to ``CTROptimizer(kl_budget=)``
holdout     number of validation rows that judge the training: ``CTROptimizer(holdout=)``, or early stopping (the best
            of 20 checks) for every other method
alpha       LoRA's alpha; the scaling is ``alpha / rank``
schedule    ``cosine``, ``linear`` (10 % warm-up, then down to 0), ``constant`` (no scheduler)
rows        training rows, drawn by the seed; None: all
held        validation rows: training rows, by whole prompts, held out of training; rates are chosen on their loss
evaluate    largest number of test rows, also of every other task
curve       steps between two evaluations; 0: only at the end
domains     other tasks whose test loss is measured; the run's own task is left out
text        plain text whose loss measures forgetting
score       ``accuracy`` (choices by likelihood), ``kl_from_base``, ``exact_match``, ``overlap``, or ``accuracy:TASK``
            for another task's choices
"""

SCHEDULES = ("cosine", "linear", "constant")

# Time of a step relative to AdamW on plain LoRA; methods that are not listed count as 1.
SLOWER = {
    "ctr": 1.3, "dora": 2.0, "adalora": 2.0, "soap": 2.5, "lora_rite": 2.5, "riemannian": 1.6, "muon": 1.4,
    "adamw_kl": 2.2, "adamw_replay": 1.7, "reflora": 1.5, "grit": 1.1, "lora_fa": 1.5, "qlora": 1.5,
}  # fmt: skip
# Tokens of a row, prompt and target, with the tokenizer of SmolLM2.
LENGTHS = {"gsm8k": 190, "mbpp": 80, "e2e": 64, "hellaswag": 75, "boolq": 38, "sst2": 30, "arc_easy": 85}
LENGTHS |= {"arc_challenge": 95, "mmlu": 120, "winogrande": 60}
LAUNCH = 1000.0  # number of tokens whose computation takes as long as the kernel launches of a step


def complete(spec: Spec) -> Spec:
    """Return a spec with every key, so that equal runs have equal specs.

    Raises:
        ValueError: an unknown key or schedule.
    """
    whole = completed(spec, DEFAULTS)
    if whole["schedule"] not in SCHEDULES:
        raise ValueError(f"schedule: got {whole['schedule']!r}, expected one of {SCHEDULES}")
    return whole


def key_of(spec: Spec) -> str:
    """Return the identity of a run: its complete spec as JSON."""
    return json.dumps(complete(spec), sort_keys=True)


def tasks_of(spec: Spec) -> list[str]:
    """Return the tasks that a run trains on, in order."""
    return list(spec["sequence"] or [spec["task"]])


def cost(spec: Spec) -> float:
    """Return the estimated time, in steps of AdamW on 16 rows of 64 tokens."""
    spec = complete(spec)
    unit, slower = LAUNCH + 16 * 64, SLOWER.get(spec["method"], 1.0)
    total = 20.0  # copying the model, adding the adapter, the first step
    for task in tasks_of(spec):
        tokens = spec["batch"] * min(LENGTHS.get(task, 100), spec["max_length"])
        total += spec["steps"] * slower * (LAUNCH + tokens) / unit
    rounds = len(tasks_of(spec))
    checks = rounds * (spec["steps"] // spec["curve"] if spec["curve"] else 0)
    own = sum(spec["evaluate"] * LENGTHS.get(task, 100) for task in tasks_of(spec))
    others = sum(spec["evaluate"] * LENGTHS.get(task, 100) for task in spec["domains"])
    text = spec["text"]["pieces"] * spec["text"]["length"] if spec["text"] else 0
    scored = {"accuracy": 3.0, "kl_from_base": 2.0, "exact_match": 100.0, "overlap": 60.0}
    extra = sum(scored.get(name.partition(":")[0], 0.0) for name in spec["score"]) * own
    forward = (rounds + checks) * (own + text) + rounds * others + extra
    if spec["holdout"]:
        forward += 20 * spec["holdout"] * LENGTHS.get(spec["task"], 100)
    return total + forward / (3 * unit)
