"""Plans of runs. Prints a JSON list for ``python -m benchmarks.real run``.

    python -m benchmarks.real plan baseline > baseline.json
    python -m benchmarks.real plan auto --only steps=50,200 --only task=e2e > part.json
    python -m benchmarks.real plan extend --lines lines.jsonl > wider.json    # rates beyond a grid's edge
    python -m benchmarks.real plan final --lines lines.jsonl --seeds 1,2,3,4  # the rate of lowest validation loss

Every run measures validation rows (held out of training) and test rows. Rates are chosen on the validation rows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

from benchmarks.real import peers as others
from benchmarks.real.plan_parts import (
    CHOICE,
    GENERATIVE,
    MIDDLE,
    RATES,
    SCHEDULES,
    UNIT,
    bounds,
    peer,
    setting,
    untrained,
)
from benchmarks.real.retention_plans import budget, retention, retention_short, sequence
from benchmarks.real.specs import WIKITEXT, Spec, complete, cost, key_of


def smoke() -> list[Spec]:
    """A few steps of every kind of run: minutes on a CPU with a small model."""
    small = {
        "steps": 3, "batch": 4, "rank": 4, "alpha": 8, "evaluate": 24, "domains": ["mbpp"], "held": 48,
        "text": {"task": "wikitext2", "split": "test", "pieces": 8, "length": 128},
    }  # fmt: skip
    kept = {"task": "wikitext2", "split": "valid", "pieces": 8, "length": 128}
    e2e = {**small, "task": "e2e"}
    retention = ["adamw_kl", "adamw_replay", "corda", "lora_null", "lora_null_frozen", "sc_lora"]
    return [
        {**e2e, "score": ["kl_from_base"], "curve": 2},
        {**e2e, "method": "adamw", "lr": 1e-3, "steps": 0},
        {**small, "task": "boolq", "method": "adamw", "lr": 1e-3, "score": ["accuracy"], "rows": 60, "holdout": 16,
         "schedule": "linear"},
        {**small, "sequence": ["boolq", "e2e", "mbpp"], "schedule": "constant", "steps": 2},
        *({**e2e, "method": method, "lr": 1e-3, "retain": kept} for method in retention),
        *({**e2e, "method": method, "lr": 1e-3} for method in others.RATES if method != "qlora"),  # needs a GPU
    ]  # fmt: skip


def baseline() -> list[Spec]:
    """Seven tasks, 200 steps of 16, AdamW over its rates, CTROptimizer over fixed bounds; one seed."""
    plan = []
    for task in [*GENERATIVE, *CHOICE]:
        spec = setting(task)
        plan += [untrained(spec), *peer(spec, "adamw"), *bounds(spec)]
    return plan


def edges() -> list[Spec]:
    """AdamW at higher rates than ``baseline``, on tasks whose best rate lies at its edge; three seeds.

    The plan also holds the rate at the edge and CTROptimizer's default.
    """
    plan = []
    for task in ("e2e", "gsm8k"):
        for seed in range(3):
            spec = setting(task, seed=seed)
            plan += [spec, *peer(spec, "adamw", [RATES[-1] * 2**i for i in range(3)])]
    return plan


def long() -> list[Spec]:
    """1000 steps on two tasks, three seeds: the default, with retained text, AdamW at rates around its best."""
    plan = []
    for task in ("e2e", "gsm8k"):
        plan.append(untrained(setting(task)))
        for seed in range(3):
            spec = setting(task, steps=1000, seed=seed)
            plan += [spec, {**spec, "retain": WIKITEXT}, *peer(spec, "adamw", RATES[3:])]
    return plan


def peers() -> list[Spec]:
    """Every other method at three rates beside the default; e2e and gsm8k, one seed, the most informative runs first.

    Each method's most promising rate comes first on both tasks, then its second and third. AdamW's other runs at 2e-4,
    8e-4 and 3.2e-3 are finished (results/retention-peers-h200.jsonl and few-rows-h200.jsonl).
    """
    tasks = [setting("e2e"), setting("gsm8k")]
    return [*tasks, *peer(tasks[0], "adamw", [8e-4]), *others.by_promise(tasks)]


def average() -> list[Spec]:
    """Averaged weights at a constant rate, with a bound that falls and one that stays, and under cosine; one seed."""
    options = [{}, *({"average": share} for share in (10, 5)), *({"average": k, "kl_schedule": "lr"} for k in (5, 2.5))]
    changes = [{"options": {"average": 10}}, *({"schedule": "constant", "options": chosen} for chosen in options)]
    return [setting(task, **change) for task in ("e2e", "gsm8k") for change in changes]


# -- nothing to tune -----------------------------------------------------------------------------------------------

FACTORS: dict[str, list[Any]] = {
    "task": ["gsm8k", "e2e", "mbpp", "boolq", "sst2", "arc_easy", "arc_challenge", "hellaswag"],
    "steps": [50, 200, 1000], "batch": [4, 16], "schedule": SCHEDULES, "rows": [None, 300],
}  # fmt: skip
CELLS = 40


def imbalance(cells: list[tuple]) -> float:
    """Return the summed squared distance of the counts of every pair of levels from equal counts."""
    total = 0.0
    names = list(FACTORS)
    for one, two in combinations(range(len(names)), 2):
        counts: dict[tuple, int] = defaultdict(int)
        for cell in cells:
            counts[cell[one], cell[two]] += 1
        levels = [(a, b) for a in FACTORS[names[one]] for b in FACTORS[names[two]]]
        mean = len(cells) / len(levels)
        total += sum((counts[pair] - mean) ** 2 for pair in levels) / mean
    return total


def cells() -> list[Spec]:
    """Return a fixed fraction of the full design: 40 cells, five per task, with balanced pairs of levels."""
    draw = random.Random(19)
    tasks = [task for task in FACTORS["task"] for _ in range(CELLS // len(FACTORS["task"]))]
    columns = [(FACTORS[name] * CELLS)[:CELLS] for name in list(FACTORS)[1:]]
    for column in columns:
        draw.shuffle(column)
    best = imbalance(list(zip(tasks, *columns, strict=True)))
    for _ in range(3000):  # A swap within a column keeps each level's count.
        column = draw.choice(columns)
        i, j = draw.randrange(CELLS), draw.randrange(CELLS)
        column[i], column[j] = column[j], column[i]
        now = imbalance(list(zip(tasks, *columns, strict=True)))
        if now <= best:
            best = now
        else:
            column[i], column[j] = column[j], column[i]
    names = list(FACTORS)
    return [
        setting(cell[0], **dict(zip(names[1:], cell[1:], strict=True))) for cell in zip(tasks, *columns, strict=True)
    ]


def auto() -> list[Spec]:
    """40 cells over task, steps, batch, schedule and rows, each with the default, fixed bounds and AdamW's grid.

    On few rows, further runs use held-out rows: they judge the bound (CTROptimizer) or stop the training (AdamW).
    """
    plan = [untrained(setting(task)) for task in FACTORS["task"]]
    for cell in cells():
        plan += [{**cell, "method": "ctr"}, *bounds(cell), *peer(cell, "adamw")]
        if cell["rows"] is not None or cell["task"] == "mbpp":
            judged = {**cell, "holdout": 48}
            plan += [{**judged, "method": "ctr"}, *peer(judged, "adamw")]
    return plan


def default_only() -> list[Spec]:
    """The cells of ``auto`` with the default only, for use after a change of the default."""
    return [{**cell, "method": "ctr"} for cell in cells()]


OUTSIDE = [1e9, 0.1, 0.03, 0.01]  # nats per token; the first value measures the KL outside the loss, and never binds
LOWER = [3e-3, 1e-3]  # for choice tasks: on base5m, their KL per prompt token is 0.02 of the KL per loss token


def outside() -> list[Spec]:
    """The default with a bound on the KL per token outside the loss; on choice tasks also with 64 tokens as enough."""
    plan = []
    for task in ("e2e", "gsm8k", "hellaswag", "boolq", "arc_easy"):
        spec = setting(task)
        plan += [untrained(spec), *({**spec, "options": {"auto": {"outside": nats}}} for nats in OUTSIDE)]
        if task in ("boolq", "arc_easy"):
            limits = [OUTSIDE[0], *OUTSIDE[2:], *LOWER]
            plan += [{**spec, "options": {"auto": {"outside": nats, "enough": 64.0}}} for nats in limits]
    return plan


# -- the paper's protocol and the users' grids -----------------------------------------------------------------------

PAPER = {"adamw": RATES, "adalora": [r * 4 for r in MIDDLE], "dora": MIDDLE, "lora_plus": [r / 4 for r in MIDDLE]}
PAPER |= {"pissa": [r / 2 for r in MIDDLE], "sensitivity": MIDDLE, "qlora": MIDDLE}


def protocol() -> list[Spec]:
    """GSM8K by generated answers, ARC-C and HellaSwag by choice; MMLU, BoolQ and WinoGrande without training on them.

    Rates are chosen without the slow scores. ``final --set evaluate=1000 --set score=...`` then measures those scores.
    """
    plan = []
    for task in ("gsm8k", "arc_challenge", "hellaswag"):
        others = [] if task == "gsm8k" else [f"accuracy:{t}" for t in ("mmlu", "boolq", "winogrande")]
        score = ["exact_match", "kl_from_base"] if task == "gsm8k" else ["accuracy", "kl_from_base", *others]
        spec = setting(task, steps=500, evaluate=1000, max_length=320, score=score)
        tuning = {**spec, "score": [] if task == "gsm8k" else ["accuracy"], "evaluate": 400}
        plan += [untrained(spec), spec]
        for method, rates in PAPER.items():
            plan += peer(tuning, method, rates)
    return plan


def templates() -> list[Spec]:
    """AdamW over learning rate and alpha / r, beside CTROptimizer at its default for each alpha."""
    plan = []
    for task in ("e2e", "gsm8k"):
        for alpha in (8, 16, 32, 64):
            spec = setting(task, alpha=alpha)
            plan += [spec, *peer(spec, "adamw")]
    return plan


def settings() -> list[Spec]:
    """Steps, batch, rank, rows and schedule, varied one at a time around the defaults."""
    changes: dict[str, list[Any]] = {
        "steps": [50, 100, 400, 1000], "batch": [4, 8, 64], "rank": [2, 4, 8, 32, 64], "rows": [100, 300, 1000],
        "schedule": ["linear", "constant"],
    }  # fmt: skip
    plan = []
    for task in ("e2e", "gsm8k"):
        for name, values in changes.items():
            for value in values:
                spec = setting(task, **{name: value}, **({"alpha": 2 * value} if name == "rank" else {}))
                plan += [spec, *peer(spec, "adamw", MIDDLE)]
    return plan


# -- from earlier lines ----------------------------------------------------------------------------------------------


def family(spec: Spec) -> str:
    """Return the identity of a run without its rate and seed."""
    return key_of({**complete(spec), "lr": None, "seed": 0})


def validation(records: Iterable[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Return the mean validation loss by family and rate. Failed runs count as infinite.

    Runs without validation rows are left out: a rate is never chosen on the test loss.
    """
    losses: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        spec = complete(record["spec"])
        loss = math.inf if "error" in record else record.get("validation")
        if spec["lr"] is not None and spec["steps"] and loss is not None:
            losses[family(spec)][spec["lr"]].append(loss if math.isfinite(loss) else math.inf)
    return {key: {lr: sum(v) / len(v) for lr, v in by_rate.items()} for key, by_rate in losses.items()}


def extend(records: list[dict[str, Any]]) -> list[Spec]:
    """Return two further rates for every grid whose best rate lies at its edge."""
    plan = []
    for key, by_rate in validation(records).items():
        best = min(by_rate, key=by_rate.__getitem__)
        step = {min(by_rate): 0.5, max(by_rate): 2.0}.get(best)
        if step is not None and len(by_rate) > 1:
            plan += [{**json.loads(key), "lr": best * factor} for factor in (step, step**2)]
    return plan


def final(records: list[dict[str, Any]], seeds: Iterable[int]) -> list[Spec]:
    """Return every family at its rate of lowest validation loss, for more seeds; runs without a rate are repeated."""
    best = {key: min(by_rate, key=by_rate.__getitem__) for key, by_rate in validation(records).items()}
    for record in records:
        spec = complete(record["spec"])
        if spec["lr"] is None and "error" not in record:
            best.setdefault(family(spec), None)
    return [{**json.loads(key), "lr": lr, "seed": seed} for key, lr in best.items() for seed in seeds]


PLANS: dict[str, Callable[[], list[Spec]]] = {
    plan.__name__: plan
    for plan in (
        smoke, baseline, edges, long, peers, average, auto, default_only, outside, retention, retention_short, budget,
        sequence, protocol, templates, settings,
    )
}  # fmt: skip
RANKED = {"peers"}  # plans whose own order counts; use `run --in-order`


def ordered(specs: Iterable[Spec]) -> list[Spec]:
    """Return each run once, the longest runs first."""
    return sorted({key_of(spec): spec for spec in specs}.values(), key=cost, reverse=True)


def select(specs: Iterable[Spec], only: Iterable[str]) -> list[Spec]:
    """Return the specs whose keys have one of the values given as ``key=value,value``."""
    kept = list(specs)
    for item in only:
        key, _, values = item.partition("=")
        if key not in complete({}) or not values:
            raise SystemExit(f"--only: got {item!r}, expected KEY=VALUE[,VALUE], KEY one of {sorted(complete({}))}")
        wanted = values.split(",")
        kept = [s for s in kept if str(complete(s)[key]) in wanted]
    return kept


def main(arguments: list[str]) -> None:
    from benchmarks.real.run import read

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", choices=[*PLANS, "extend", "final"])
    parser.add_argument("--lines", nargs="*", default=[], help="results of earlier runs, for `extend` and `final`")
    parser.add_argument("--seeds", default="1,2", help="seeds of `final`, separated by commas")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="set KEY in every run")
    parser.add_argument("--only", action="append", default=[], metavar="KEY=VALUE[,VALUE]", help="keep matching runs")
    args = parser.parse_args(arguments)
    if args.plan == "extend":
        specs = extend(read(args.lines))
    elif args.plan == "final":
        specs = final(read(args.lines), [int(seed) for seed in args.seeds.split(",")])
    else:
        specs = PLANS[args.plan]()
    changes = {key: json.loads(value) for key, _, value in (item.partition("=") for item in args.set)}
    chosen = [{**spec, **changes} for spec in select(specs, args.only)]
    specs = chosen if args.plan in RANKED else ordered(chosen)
    total = sum(map(cost, specs))
    minutes = f"about {total * UNIT / 60:.0f} minutes of one H200 with nine processes"
    print(f"{args.plan}: {len(specs)} runs, cost {total:.0f} steps of 16 x 64 tokens, {minutes}", file=sys.stderr)
    print(json.dumps(specs))
