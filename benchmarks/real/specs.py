"""A run's specification: every key with its default, a run's identity, its estimated cost."""

from __future__ import annotations

import json
from typing import Any

Spec = dict[str, Any]

WIKITEXT: Spec = {"task": "wikitext2", "split": "valid", "pieces": 64, "length": 256}
"""Retained text for the peers and for ``retain``: what WikiText-2's test loss is measured against."""

DEFAULTS: Spec = {
    "method": "ctr", "task": "e2e", "sequence": None, "lr": None, "options": {}, "retain": None, "kl_budget": None,
    "holdout": 0, "rank": 16, "alpha": 32, "steps": 200, "batch": 16, "schedule": "cosine", "rows": None, "held": 200,
    "seed": 0, "evaluate": 400, "max_length": 256, "curve": 0, "domains": ["mbpp", "gsm8k"],
    "text": {"task": "wikitext2", "split": "test", "pieces": 64, "length": 256}, "score": [], "dtype": "float32",
}  # fmt: skip
"""
method      one of :data:`benchmarks.real.methods.METHODS`; ``lr`` and ``options`` are its learning rate (None: its
            default) and the keyword arguments of its optimizer, see there
task        folder of ``train.jsonl`` and ``test.jsonl``; ``sequence``: several, trained on one after the other instead,
            ``steps`` each, with one adapter and one optimizer; every task is tested after each
retain      text whose predictions should stay: None (the method's default), ``"none"``, ``"self"``, or
            ``{"task", "split", "pieces", "length"}``; goes to ``CTROptimizer(retain=)`` and to the peers of retention
kl_budget   goes to ``CTROptimizer(kl_budget=)``
holdout     rows, out of those held out of training, that may judge the training: ``CTROptimizer(holdout=)``, or early
            stopping (the best of 20 checks) for every other method
alpha       LoRA's alpha; its scaling is ``alpha / rank``
schedule    ``cosine``, ``linear`` (10 % warm-up, then down to 0), ``constant`` (no scheduler is attached)
rows        training rows, drawn by the seed; None: all
held        training rows, whole prompts, held out of training; rates are chosen by their loss (``validation``)
evaluate    test rows at most, and those of every other task
curve       steps between two evaluations; 0: only at the end
domains     other tasks whose test loss is taken; the run's own is left out
text        plain text whose loss is taken: forgetting
score       ``accuracy`` (choices by likelihood), ``kl_from_base``, ``exact_match``, ``overlap``, or ``accuracy:TASK``
            for another task's choices
"""

SCHEDULES = ("cosine", "linear", "constant")

# Time of a step against AdamW's on plain LoRA; what is not here takes as long.
SLOWER = {
    "ctr": 1.3, "dora": 2.0, "adalora": 2.0, "soap": 2.5, "lora_rite": 2.5, "riemannian": 1.6, "muon": 1.4,
    "adamw_kl": 2.2, "adamw_replay": 1.7,
}  # fmt: skip
# Tokens of a row, prompt and target, with the tokenizer of SmolLM2.
LENGTHS = {"gsm8k": 190, "mbpp": 80, "e2e": 64, "hellaswag": 75, "boolq": 38, "sst2": 30, "arc_easy": 85}
LENGTHS |= {"arc_challenge": 95, "mmlu": 120, "winogrande": 60}
LAUNCH = 1000.0  # tokens that take as long as a step's launches


def complete(spec: Spec) -> Spec:
    """A spec with every key, so that equal runs have equal keys; raises ValueError for what there is not."""
    unknown = set(spec) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"spec: unknown keys {sorted(unknown)}; expected some of {sorted(DEFAULTS)}")
    whole = {**DEFAULTS, **spec}
    if whole["schedule"] not in SCHEDULES:
        raise ValueError(f"schedule: got {whole['schedule']!r}, expected one of {SCHEDULES}")
    return whole


def key_of(spec: Spec) -> str:
    """Identity of a run."""
    return json.dumps(complete(spec), sort_keys=True)


def tasks_of(spec: Spec) -> list[str]:
    """The tasks that a run trains on, in order."""
    return list(spec["sequence"] or [spec["task"]])


def cost(spec: Spec) -> float:
    """Estimated time, in steps of AdamW on 16 rows of 64 tokens."""
    spec = complete(spec)
    unit, slower = LAUNCH + 16 * 64, SLOWER.get(spec["method"], 1.0)
    total = 20.0  # the copy of the model, the adapter, the first step
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
