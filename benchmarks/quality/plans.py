"""Plans: the runs behind each table.

    python -m benchmarks.quality.plans tune > tune.json
    python -m benchmarks.quality.plans extend --lines lines.jsonl > more.json   # beyond a grid's edge
    python -m benchmarks.quality.plans final --lines lines.jsonl > final.json

Other methods' learning rates are chosen by validation loss with a separate seed. Tables show other seeds on the test
split. CTROptimizer runs at its defaults. The unit of cost is a run of 150 steps of 32 rows on base30m.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.specs import completed

Spec = dict[str, Any]

DEFAULTS: Spec = {
    "method": "ctr", "base": "base5m", "task": "e2e", "lr": None, "rank": 8, "steps": 300, "batch": 32, "seed": 0,
    "options": {}, "split": "validation", "held": 600, "evaluate": 600, "max_length": 256, "curve": 0, "also": [],
    "score": [], "dtype": "float32",
}  # fmt: skip
"""``held``: training rows held out for validation. ``evaluate``: number of evaluated rows of ``split``. ``also``: other
tasks whose test loss is measured (or a folder with a ``test.txt``). ``score``: see
:func:`benchmarks.quality.run.score`. ``curve``: steps between evaluations. ``lr`` None: the default (CTR only)."""

TUNING_SEED = 100
SEEDS = range(5)

# For each method: the middle of its grid of five rates, a factor of 2 apart, and its time relative to AdamW.
PEERS: dict[str, tuple[float, float]] = {
    "adamw": (8e-3, 1.0), "rslora": (4e-3, 1.0), "dora": (8e-3, 2.2), "pissa": (2e-3, 1.1), "lora_plus": (2e-3, 1.0),
    "lora_fa": (8e-3, 2.0), "lora_ga": (2e-3, 1.2), "riemannian": (4e-3, 2.5), "adalora": (1.6e-2, 3.0),
    "eva": (8e-3, 1.2), "sensitivity": (8e-3, 1.2), "truncated": (8e-3, 1.2), "muon": (4e-2, 1.5), "soap": (4e-3, 5.0),
    "lora_rite": (8e-3, 5.0), "reflora": (8e-3, 1.4), "grit": (8e-3, 1.2), "yogi": (8e-3, 1.5), "lamb": (3.2e-2, 1.5),
    "adabelief": (1.6e-2, 1.5),
}  # fmt: skip
# Default rate of each package; torch's AdamW trains PEFT's methods.
PACKAGE_RATES = {"ctr": 8e-2, "soap": 3e-3, "yogi": 1e-2}
PACKAGE_RATE = 1e-3

E2E: Spec = {"base": "base30m", "task": "e2e", "steps": 150}
SMALL: Spec = {"base": "base5m", "steps": 150, "batch": 16}
TASKS: list[Spec] = [
    {**SMALL, "task": "gsm8k"},
    {**SMALL, "task": "sst2", "score": ["accuracy"]},
    {**SMALL, "task": "boolq", "score": ["accuracy"]},
    {**SMALL, "task": "arc_easy", "held": 400, "score": ["accuracy"]},
    {**SMALL, "task": "mbpp", "held": 80},
]
SCHEDULE = {"interval": 25, "until": 0.6}
CTR_VARIANTS: list[dict[str, Any]] = [
    {},
    *({"betas": [beta, 0.999], "max_kl": max_kl} for beta in (0.9, 0.8, 0.7, 0.5) for max_kl in (0.05, 0.1, 0.15, 0.2)),
    {"betas": [0.8, 0.99]},
    *({"factor_interval": n, "basis_interval": n} for n in (1, 20)),
    *({"factor_decay": decay} for decay in (0.9, 0.98)),
    {"kl_schedule": "constant", "max_kl": 2.5e-2},
    *({"calibration_interval": n} for n in (10, 50)),
    *({"lr_ratio": ratio} for ratio in (0.25, 4, 16)),
    *({"max_tokens": n} for n in (64, 256, None)),
    {"factor_structure": "dense"},
    {"adapter": {"use_rslora": True}},
    {"initialize": {}},
    {"rank_scheduler": SCHEDULE},
]


def complete(spec: Spec) -> Spec:
    """Return a spec with every key, so that equal runs have equal specs; raise ValueError for an unknown key."""
    return completed(spec, DEFAULTS)


def key_of(spec: Spec) -> str:
    """Return the identity of a run: its complete spec as JSON."""
    return json.dumps(complete(spec), sort_keys=True)


def cost(spec: Spec) -> float:
    """Return the estimated cost, in runs of 150 steps of 32 rows on base30m with AdamW."""
    spec = complete(spec)
    unit = {"base5m": 1.2, "base30m": 1.0}.get(spec["base"], 1.0) * spec["batch"] / 32 * spec["steps"] / 150
    slower = 1.4 if spec["method"] == "ctr" else PEERS.get(spec["method"], (0.0, 1.5))[1]
    scores = 0.4 * len(set(spec["score"]) & {"overlap", "exact_match"}) + 0.05 * len(spec["also"])
    evaluations = 1 + (spec["steps"] // spec["curve"] if spec["curve"] else 0)
    return unit * slower + scores + evaluations * spec["evaluate"] / 600 * 0.03


def grid(method: str, steps: Iterable[int] = range(-2, 3)) -> list[float]:
    """Return learning rates ``2 ** step`` times the middle of a method's grid (CTR: times its default)."""
    middle = package_rate(method) if method == "ctr" else PEERS[method][0]
    return [middle * 2.0**step for step in steps]


def _tuned(setting: Spec, methods: Iterable[str]) -> list[Spec]:
    validation = {k: v for k, v in setting.items() if k not in ("score", "also", "curve")}
    return [{**validation, "method": m, "lr": lr, "seed": TUNING_SEED} for m in methods for lr in grid(m)]


class Lines:
    """Results of earlier runs: the best rate of each method and the ranking of methods."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.losses: dict[tuple, dict[float, float]] = defaultdict(dict)
        for record in records:
            spec = complete(record["spec"])
            tuning = spec["seed"] == TUNING_SEED and spec["split"] == "validation" and spec["lr"] is not None
            if tuning and spec["method"] in PEERS and not spec["options"]:
                loss = record.get("loss", float("inf"))  # A failed run is never the best.
                self.losses[self._key(spec)][spec["lr"]] = loss if loss == loss else float("inf")

    @staticmethod
    def _key(spec: Spec) -> tuple:
        return tuple(complete(spec)[k] for k in ("method", "base", "task", "rank", "steps", "batch"))

    def rate(self, spec: Spec) -> float:
        """Return the best rate of the most similar tuning: first other ranks and steps, then other tasks."""
        key = self._key(spec)
        for same in range(len(key), 0, -1):
            near = {k: v for k, v in self.losses.items() if k[:same] == key[:same]}
            if near:
                best = {k: min(v, key=v.__getitem__) for k, v in near.items()}
                return best[min(best, key=lambda k: abs(k[3] - key[3]))]  # rate at the nearest rank
        return PEERS[key[0]][0]

    def ranking(self, spec: Spec) -> list[str]:
        """Return the methods that were tuned on this setting, best first."""
        key = self._key(spec)
        best = {k[0]: min(v.values()) for k, v in self.losses.items() if k[1:] == key[1:]}
        return sorted(best, key=best.__getitem__)

    def best_three(self) -> list[str]:
        """Return AdamW and the three best other methods on E2E, without ``truncated``, which cuts after training."""
        ranking = [m for m in self.ranking(E2E) if m not in ("adamw", "truncated")]
        return ["adamw", *(ranking or ["rslora", "lora_plus", "soap"])[:3]]

    def at_edge(self) -> list[Spec]:
        """Return two further rates for every grid whose best rate lies at its edge."""
        specs = []
        for key, losses in self.losses.items():
            best = min(losses, key=losses.__getitem__)
            names = ("method", "base", "task", "rank", "steps", "batch")
            setting = dict(zip(names, key, strict=True))
            held = next((t["held"] for t in TASKS if t["task"] == setting["task"] and "held" in t), DEFAULTS["held"])
            outward = {min(losses): 0.5, max(losses): 2.0}.get(best)
            if outward is not None:
                specs += [
                    {**setting, "held": held, "lr": best * factor, "seed": TUNING_SEED}
                    for factor in (outward, outward**2)
                ]
        return specs


def variants(lines: Lines) -> list[Spec]:
    """Options of CTR on validation data: two tasks, two seeds that no table uses; the defaults also at 300 steps."""
    settings = [E2E, TASKS[0]]
    seeds = (TUNING_SEED, TUNING_SEED + 1)
    plan = [{**s, "seed": seed, "options": o} for seed in seeds for s in settings for o in CTR_VARIANTS]
    return plan + [{**s, "steps": 300, "seed": seed} for seed in seeds for s in settings]


def tune(lines: Lines) -> list[Spec]:
    """Every other method over its grid on E2E; AdamW also at 300 steps and at other ranks."""
    more = [{**E2E, "steps": 300}, {**E2E, "rank": 2}, {**E2E, "rank": 16}]
    return _tuned(E2E, PEERS) + [spec for setting in more for spec in _tuned(setting, ["adamw"])]


def tune_tasks(lines: Lines) -> list[Spec]:
    """AdamW on the other tasks; the three best peers near their best rate on E2E there, at 300 steps and rank 2."""
    plan = [spec for setting in TASKS for spec in _tuned(setting, ["adamw"])]
    for setting in [*TASKS, {**E2E, "steps": 300}, {**E2E, "rank": 2}]:
        for spec in _tuned(setting, lines.best_three()[1:]):
            best = lines.rate({**E2E, "method": spec["method"]})
            if 0.4 < spec["lr"] / best < 2.5:
                plan.append(spec)
    return plan


def extend(lines: Lines) -> list[Spec]:
    """Rates beyond every grid whose best rate lies at its edge."""
    return lines.at_edge()


def _peer(setting: Spec, method: str, lines: Lines) -> Spec:
    return {**setting, "method": method, "lr": lines.rate({**setting, "method": method})}


def final(lines: Lines) -> list[Spec]:
    """E2E at 300 steps with generation, forgetting and the curve: CTR, AdamW and the three best peers; five seeds."""
    setting = {
        **E2E, "steps": 300, "split": "test", "evaluate": 1000, "curve": 30, "score": ["overlap", "kl_from_base"],
        "also": ["wikitext2", "gsm8k", "mbpp"],
    }  # fmt: skip
    plan = [{**setting, "seed": seed} for seed in SEEDS]
    plan += [{**_peer(setting, m, lines), "seed": seed} for m in lines.best_three() for seed in SEEDS]
    return [*plan, {**setting, "method": "adamw", "lr": 1e-3, "steps": 0, "curve": 0}]  # the untrained base model


def task_table(lines: Lines) -> list[Spec]:
    """Five more tasks: CTR, AdamW, the three best peers; five seeds. GSM8K answers are generated once per method."""
    plan = []
    for task in TASKS:
        others = ["wikitext2", *(["arc_challenge", "winogrande"] if task["task"] == "arc_easy" else [])]
        setting = {**task, "split": "test", "evaluate": 1000, "also": others}
        for seed in SEEDS:
            exact = {"score": ["exact_match", "kl_from_base"]} if task["task"] == "gsm8k" and seed == 0 else {}
            plan.append({**setting, **exact, "seed": seed})
            plan += [{**_peer(setting, m, lines), **exact, "seed": seed} for m in lines.best_three()]
    return plan


def peers(lines: Lines) -> list[Spec]:
    """Every other method at its best rate on E2E, 150 steps: three seeds, slow methods two; QLoRA at AdamW's rate."""
    setting = {**E2E, "split": "test", "evaluate": 1000}
    plan = [{**setting, "seed": seed} for seed in range(3)]
    for method, (_, slower) in PEERS.items():
        plan += [{**_peer(setting, method, lines), "seed": seed} for seed in range(3 if slower < 2 else 2)]
    return plan + [{**_peer(setting, "adamw", lines), "method": "qlora", "seed": seed} for seed in range(2)]


def pareto(lines: Lines) -> list[Spec]:
    """Loss against parameters: ranks 1 to 16 of CTR (uniform, scheduled), AdamW and the best peer; three seeds."""
    plan = []
    for rank in (1, 2, 4, 8, 16):
        setting = {**E2E, "rank": rank, "split": "test", "evaluate": 1000}
        for seed in range(3):
            options: list[dict[str, Any]] = [{}, {"rank_scheduler": SCHEDULE}] if rank in (2, 4) else [{}]
            plan += [{**setting, "seed": seed, "options": o} for o in options]
            plan += [{**_peer(setting, m, lines), "seed": seed} for m in lines.best_three()[:2]]
    return plan


def package_rate(method: str) -> float:
    """Return the default learning rate of a method's package."""
    return PACKAGE_RATES.get(method, PACKAGE_RATE)


def wide_grid(method: str) -> list[float]:
    """Return seven rates a factor of 2 apart around the middle of a method's grid, a 64-fold range."""
    return grid(method, range(-3, 4))


def robustness(lines: Lines) -> list[Spec]:
    """Every method over a 64-fold range of learning rates, and at its package's default rate."""
    setting = {**E2E, "seed": TUNING_SEED}
    rates = {method: [*wide_grid(method), package_rate(method)] for method in ("ctr", *PEERS)}
    return [{**setting, "method": method, "lr": lr} for method, some in rates.items() for lr in some]


def ablation(lines: Lines) -> list[Spec]:
    """Curvature, trust region, ranks and start directions off and on; values of max_kl, betas and trust_penalty."""
    setting = {**E2E, "split": "test", "evaluate": 1000}
    free: dict[str, Any] = {"max_kl": None, "calibration_interval": None}
    rows: list[Spec] = [{}, *({"lr": lr, "options": free} for lr in (4e-3, 8e-3))]
    rows += [{"lr": 8e-3, "options": {**free, "curvature": "none"}}]
    rows += [{"options": {"rank_scheduler": SCHEDULE}}, {"options": {"initialize": {}}}]
    plan = [{**setting, **row, "seed": seed} for row in rows for seed in range(3)]
    doses: list[Spec] = [{"max_kl": max_kl} for max_kl in (2.5e-2, 5e-2, 0.2, 0.4)]
    doses += [{"betas": [0.9, 0.999], "max_kl": max_kl} for max_kl in (5e-2, 0.1)]
    doses += [{"trust_penalty": penalty} for penalty in (1e-3, 1e-2)]
    return plan + [{**setting, "options": dose, "seed": seed} for dose in doses for seed in range(2)]


def timing(lines: Lines) -> list[Spec]:
    """Time and memory of 60 steps of every method; run with ``--workers 1``."""
    setting = {**E2E, "steps": 60, "evaluate": 64, "seed": TUNING_SEED}
    return [{**setting}, *({**_peer(setting, m, lines)} for m in PEERS)]


def smoke(lines: Lines) -> list[Spec]:
    """Three steps of every method on base5m."""
    setting = {**SMALL, "task": "e2e", "steps": 3, "batch": 4, "evaluate": 32, "rank": 4}
    start = {"initialize": {"batches": 2}, "rank_scheduler": {"interval": 1}}
    return [
        setting,
        {**setting, "options": start, "score": ["overlap", "kl_from_base"], "also": ["wikitext2"], "curve": 2},
        *({**setting, "method": m, "lr": rate} for m, (rate, _) in PEERS.items()),
        {**setting, "method": "qlora", "lr": 8e-3},
    ]


PLANS: dict[str, Callable[[Lines], list[Spec]]] = {
    plan.__name__: plan
    for plan in (
        smoke, variants, tune, tune_tasks, extend, final, task_table, peers, pareto, robustness, ablation, timing,
    )
}  # fmt: skip


def make(name: str, lines: Lines) -> list[Spec]:
    """Return a plan with each run once, the longest first, so that all workers finish at about the same time."""
    specs = {key_of(spec): spec for spec in PLANS[name](lines)}
    return sorted(specs.values(), key=cost, reverse=True)


def again(records: Iterable[dict[str, Any]]) -> list[Spec]:
    """Return the specs of results as a plan that repeats them. In older specs ``held`` equals ``evaluate``."""
    specs = [record["spec"] for record in records]
    return [{**spec, "held": spec.get("held", spec.get("evaluate", DEFAULTS["held"]))} for spec in specs]


def read(paths: Iterable[str]) -> list[dict[str, Any]]:
    """Return the records of results files, without truncated lines."""
    records = []
    for path in paths:
        for line in Path(path).read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=[*PLANS, "again"], help="a plan's name; again: repeat the runs of --lines")
    parser.add_argument("--lines", nargs="*", default=[], help="results of earlier runs")
    args = parser.parse_args()
    records = read(args.lines)
    specs = again(records) if args.plan == "again" else make(args.plan, Lines(records))
    print(f"{args.plan}: {len(specs)} runs, cost {sum(map(cost, specs)):.0f}", file=sys.stderr)
    print(json.dumps(specs))


if __name__ == "__main__":
    main()
