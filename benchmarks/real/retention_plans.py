"""Plans of retention: task loss against forgetting, budgets, tasks in sequence."""

from __future__ import annotations

from benchmarks.real.plan_parts import MIDDLE, RATES, bounds, peer, setting, untrained
from benchmarks.real.specs import WIKITEXT, Spec

RETENTION_TASKS = ["e2e", "gsm8k", "mbpp", "boolq", "sst2", "hellaswag"]
STARTS = ["corda", "lora_null", "lora_null_frozen", "sc_lora"]
FEW = RATES[1:6:2]  # 2e-4, 8e-4, 3.2e-3
BUDGETS = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]


def retention() -> list[Spec]:
    """Task loss against forgetting; one seed, then ``final``.

    CTROptimizer varies bound, budget and penalty, with and without retained text. AdamW varies its rate, plain, with a
    KL term, with replay, and from initialisations that claim to preserve knowledge.
    """
    plan = []
    for task in RETENTION_TASKS:
        spec = setting(task)
        kept = {**spec, "retain": WIKITEXT}
        plan += [untrained(spec), *peer(spec, "adamw"), *peer(spec, "rslora", MIDDLE), *peer(spec, "lora_plus", MIDDLE)]
        plan += [spec, *({**spec, "retain": how} for how in ("none", "self", WIKITEXT))]
        plan += [s for how in (spec, kept) for s in bounds(how, (1e-2, 3e-2, 0.3))]
        plan += [{**how, "kl_budget": nats} for how in (spec, kept) for nats in BUDGETS]
        plan += [{**spec, "options": {"trust_penalty": weight}} for weight in (0.01, 0.03, 0.1, 0.3, 1.0)]
        for weight in (0.01, 0.03, 0.1, 0.3, 1.0):
            plan += peer(kept, "adamw_kl", FEW, options={"weight": weight})
        for share in (0.1, 0.3, 0.5):
            plan += peer(kept, "adamw_replay", FEW, options={"share": share})
        for method in STARTS:
            plan += peer(kept, method, MIDDLE)
    return plan


def retention_short() -> list[Spec]:
    """A short form of ``retention``: three tasks, few rates."""
    plan = []
    for task in ("e2e", "gsm8k", "boolq"):
        spec = setting(task)
        kept = {**spec, "retain": WIKITEXT}
        plan += [untrained(spec), *peer(spec, "adamw", RATES[1:]), spec, {**spec, "retain": "self"}, kept]
        plan += peer(kept, "adamw_kl", FEW, options={"weight": 0.1})
        plan += peer(kept, "adamw_replay", FEW, options={"share": 0.3})
        for method in STARTS:
            plan += peer(kept, method, FEW)
    return plan


def budget() -> list[Spec]:
    """``kl_budget`` from 0.05 to 2 nats with and without retained text: does it hold, and at which task loss?"""
    plan = []
    for task in ("e2e", "gsm8k"):
        spec = setting(task)
        kept = {**spec, "retain": WIKITEXT}
        plan += [untrained(spec), spec, kept]
        plan += [{**how, "kl_budget": nats} for how in (kept, spec) for nats in BUDGETS]
    return plan


def sequence() -> list[Spec]:
    """Three tasks in sequence, to measure what the model keeps of the first; three seeds."""
    spec = setting("e2e", sequence=["e2e", "gsm8k", "boolq"], domains=["mbpp"], score=[])
    kept = {**spec, "retain": WIKITEXT}
    plan = []
    for seed in range(3):
        runs = [spec, {**spec, "retain": "self"}, kept, *peer(spec, "adamw", RATES[1:])]
        runs += peer(kept, "adamw_replay", FEW, options={"share": 0.3})
        plan += [{**run, "seed": seed} for run in runs]
    return plan
