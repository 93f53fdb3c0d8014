"""Plans about adaptive ranks, for the runner of ``benchmarks.quality``: what they gain, and why.

    python -m benchmarks.ranks.plan causes > causes.json
    python -m benchmarks.ranks.plan table --lines tuning.jsonl > table.json
    python -m benchmarks.ranks.plan multiples > multiples.json
    python -m benchmarks.quality.run table.json --data DIR --models DIR --out ranks.jsonl

``table``: mean ranks 2, 4 and 8, test loss. Uniform ranks, scheduled ranks, start directions, both, and ranks pruned
from twice the rank. Other methods that choose ranks or directions run at the best rate of the most similar tuning
(other ranks, then other tasks).

``causes``: mean rank 4 at the end, seeds 0 to 2. Uniform ranks (also rank 8, the start of the pruned ranks); scheduled
ranks; ranks pruned from twice the rank slowly, in one late event, or after the last step; layers that may be dropped;
ranks by kind of layer, set by hand; scheduled ranks with and without the optimizer's state.

``multiples``: mean ranks 8 and 16, seeds 0 to 2. Uniform ranks, and ranks that move by 1, 4 and 8.
"""

from __future__ import annotations

import argparse
import json

from benchmarks.quality import plans
from benchmarks.quality.plans import SCHEDULE, Spec

GSM8K, CLASSIFICATION = plans.TASKS[:2]
SETTINGS: list[Spec] = [plans.E2E, {**plans.SMALL, "task": "e2e"}, GSM8K]
RANK = 4
HASTY = {"interval": 10, "until": 0.9, "hysteresis": 0.0, "max_change": None}
PRUNE = {"budget": RANK, "hysteresis": 1e6}  # Existing directions always win over absent ones.


def scheduled(steps: int) -> dict[str, tuple[int, Spec]]:
    """Return rank schedules by name: the starting rank and the scheduler's options."""
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
    """Return the LoRA config of given ranks of attention and MLP layers, with an unchanged scaling."""
    ranks = {r".*self_attn\..*": attention, r".*mlp\..*": mlp}
    return {"rank_pattern": ranks, "alpha_pattern": {k: 2 * r for k, r in ranks.items()}}


def causes() -> list[Spec]:
    """Return the plan ``causes``: why adaptive ranks gain so little."""
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


def table(lines: plans.Lines) -> list[Spec]:
    """Return the plan ``table``: uniform and adaptive ranks, and other methods, at equal parameters.

    CTROptimizer and AdamW run with five seeds, the other methods with three.
    """
    specs = []
    gradual = {"gradual": True, "interval": 10, "until": 0.6}
    for setting in [*SETTINGS, CLASSIFICATION]:
        for rank in (2, 4, 8):
            common = {**setting, "rank": rank, "split": "test", "evaluate": 1000}
            pruned = {**common, "rank": 2 * rank, "options": {"rank_scheduler": {"budget": rank, **gradual}}}
            options: list[Spec] = [
                {},
                {"rank_scheduler": SCHEDULE},
                {"initialize": {}},
                {"initialize": {}, "rank_scheduler": SCHEDULE},
            ]
            ours = [*({**common, "options": o} for o in options), pruned]
            specs += [{**spec, "method": "ctr", "seed": seed} for spec in ours for seed in plans.SEEDS]
            for method, seeds in (("adamw", 5), ("adalora", 3), ("eva", 3), ("truncated", 3)):
                rate = lines.rate({**common, "method": method})
                specs += [{**common, "method": method, "lr": rate, "seed": seed} for seed in range(seeds)]
    return specs


def multiples() -> list[Spec]:
    """Return the plan ``multiples``: whether larger rank moves cost quality."""
    specs = []
    for seed in range(3):
        for rank, choices in ((8, (1, 4)), (16, (1, 4, 8))):
            options: list[Spec] = [{}, *({"rank_scheduler": {**SCHEDULE, "multiple": m}} for m in choices)]
            common = {**plans.E2E, "method": "ctr", "split": "test", "rank": rank, "seed": seed}
            specs += [{**common, "options": o} for o in options]
    return specs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=["causes", "table", "multiples"])
    parser.add_argument("--lines", nargs="*", default=[], help="results files with tuning runs, for rates")
    args = parser.parse_args()
    made = {"causes": causes, "multiples": multiples, "table": lambda: table(plans.Lines(plans.read(args.lines)))}
    print(json.dumps(made[args.plan]()))


if __name__ == "__main__":
    main()
