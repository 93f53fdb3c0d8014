"""A run's specification: every key with its default, a run's identity, its estimated cost, and the plans."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.specs import completed

Spec = dict[str, Any]

DEFAULTS: Spec = {
    "task": "arithmetic", "method": "ctr", "lr": None, "options": {}, "rank": 16, "alpha": 32, "updates": 100,
    "prompts": 16, "group": 8, "passes": 1, "clip": 0.2, "beta": 0.0, "temperature": 1.0, "new_tokens": 6, "rows": None,
    "schedule": "cosine", "seed": 0, "evaluate": 400, "evaluate_every": 25, "measure_every": 5,
    "text": {"task": "wikitext2", "split": "test", "pieces": 64, "length": 256},
}  # fmt: skip
"""
method          ``ctr``: CTROptimizer at its defaults; ``adamw``: AdamW at ``lr``, gradients clipped to a norm of 1
options         keyword arguments of the optimizer
updates         batches of samples; each batch takes ``passes`` optimizer steps
prompts, group  prompts of a batch, and samples for each prompt
passes          optimizer steps on one batch of samples (TRL: ``num_iterations``); above 1, PPO's ``clip`` applies
beta            weight of KL(policy || base) in the loss, by Schulman's estimator; 0: none
new_tokens      most tokens of a completion; it ends at a newline
rows            training sums, drawn by the seed; None: all, so that no prompt comes twice
schedule        ``cosine``, ``linear`` or ``constant``
evaluate        held-out sums, for greedy accuracy every ``evaluate_every`` updates
measure_every   updates between measurements of a step's KL on its own samples
text            plain text whose loss is taken before and after: forgetting
"""

RATES = (2e-5, 2e-4, 1e-3)  # of AdamW
FEW = 160  # training sums: 100 updates of 16 prompts see each of them ten times


def complete(spec: Spec) -> Spec:
    """Return a spec with every key, so that equal runs have equal keys.

    Raises:
        ValueError: for an unknown key.
    """
    return completed(spec, DEFAULTS)


def key_of(spec: Spec) -> str:
    """Return the identity of a run."""
    return json.dumps(complete(spec), sort_keys=True)


def price(spec: Spec) -> float:
    """Return the estimated time of a run, in training steps."""
    spec = complete(spec)
    sampling = 0.4 * spec["new_tokens"]
    checks = 2 + (spec["updates"] // spec["evaluate_every"] if spec["evaluate_every"] else 0)
    return 20 + spec["updates"] * (sampling + spec["passes"]) + checks * spec["evaluate"] * sampling / 128


def _methods(rates: tuple[float, ...], *options: Spec) -> list[Spec]:
    ours = [{"method": "ctr", "options": given} for given in ({}, *options)]
    return ours + [{"method": "adamw", "lr": lr} for lr in rates]


def _over(seeds: tuple[int, ...], methods: list[Spec], **setting: Any) -> list[Spec]:
    return [complete({**method, **setting, "seed": seed}) for seed in seeds for method in methods]


def plans() -> dict[str, list[Spec]]:
    """Return the plans by name.

    ``grpo``: one step for each batch, CTROptimizer at its defaults and AdamW at three rates, three seeds.
    ``bounds``: other bounds of CTROptimizer, two seeds. ``iterations``: two passes over each batch, two seeds.
    ``few``: 160 training sums, so that each prompt comes ten times, one seed.
    """
    rate = {"kl_schedule": "lr"}
    return {
        "grpo": _over((0, 1, 2), _methods(RATES)),
        "bounds": _over((0, 1), _methods((), {"max_kl": 0.01}, {"max_kl": 0.03}, rate)[1:]),
        "iterations": _over((0, 1), _methods(RATES[1:], rate), passes=2),
        "few": _over((0,), _methods(RATES[1:], rate), rows=FEW),
    }
