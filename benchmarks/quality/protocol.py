"""The paper's protocol on your own model: fine-tune on each task with each method, then test.

    python -m benchmarks.quality.protocol --model NAME --data DIR --out lines.jsonl \\
        --tasks gsm8k,arc_challenge,boolq,mmlu,hellaswag,winogrande \\
        --methods ctr,adamw,dora --rates adamw=1e-4:2e-4:4e-4 --rates dora=2e-4

Accuracy uses the likelihood of the choices; GSM8K uses the number at the end of the generated answer. DIR holds
``TASK/train.jsonl`` and ``TASK/test.jsonl`` with rows of ``prompt`` and ``target`` (choice tasks also ``choices`` and
``label``). A task without a training split is tested after training on ``--train-on``. A missing task is skipped with a
message. A method with several rates is tested at the rate of lowest validation loss. CTR runs at its defaults.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import plans, report
from benchmarks.quality.run import append, finished, train

PAPER = "gsm8k,arc_challenge,boolq,mmlu,hellaswag,winogrande"


def sort_tasks(data: Path, names: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Return tasks with a training split, tasks with a test split only, and missing tasks."""
    there = [t for t in names if (data / t / "test.jsonl").exists()]
    trained = [t for t in there if (data / t / "train.jsonl").exists()]
    return trained, [t for t in there if t not in trained], [t for t in names if t not in there]


def score_of(data: Path, task: str) -> list[str]:
    """Return the scores of a task: accuracy of choices, exact match of the final number, or none besides the loss."""
    with open(data / task / "test.jsonl") as lines:
        row = json.loads(next(lines))
    return ["accuracy"] if "choices" in row else ["exact_match"] if "####" in row["target"] else []


def parse_rates(given: list[str]) -> dict[str, list[float]]:
    """Return lists of rates by method, parsed from texts of the form ``method=rate:rate``."""
    rates = {}
    for item in given:
        method, _, values = item.partition("=")
        if method not in plans.PEERS or not values:
            raise ValueError(
                f"--rates: got {item!r}, expected METHOD=RATE[:RATE...], METHOD one of {list(plans.PEERS)}"
            )
        rates[method] = [float(v) for v in values.split(":")]
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, help="results file, JSON lines; finished runs are skipped")
    parser.add_argument("--tasks", default=PAPER)
    parser.add_argument("--methods", default="ctr,adamw,lora_plus,dora,pissa,adalora,sensitivity,qlora")
    parser.add_argument("--rates", action="append", default=[], metavar="METHOD=RATE[:RATE...]")
    parser.add_argument("--train-on", help="training task of test-only tasks; default: the first choice task")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held", type=int, default=300, help="training rows held out to choose rates")
    parser.add_argument("--evaluate", type=int, default=2000, help="largest number of test rows")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    args = parser.parse_args()
    rates = parse_rates(args.rates)
    trained, tested, absent = sort_tasks(args.data, args.tasks.split(","))
    for task in absent:
        print(f"{task}: skipped, {args.data / task / 'test.jsonl'} does not exist")
    if not trained:
        raise SystemExit(f"--tasks: got {args.tasks}, expected at least one with a train.jsonl under {args.data}")
    source = args.train_on or next((t for t in trained if score_of(args.data, t) == ["accuracy"]), trained[0])
    for task in tested:
        print(f"{task}: no training split, tested after training on {source}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records: list[dict[str, Any]] = plans.read([args.out]) if Path(args.out).exists() else []

    def run(spec: plans.Spec) -> dict[str, Any]:
        spec = plans.complete(spec)
        if plans.key_of(spec) in finished(args.out):
            return next(r for r in records if plans.key_of(r["spec"]) == plans.key_of(spec))
        try:
            record = {"spec": spec, **train(spec, str(args.data), "", device)}
        except Exception as error:  # A method that cannot run must not stop the others.
            record = {"spec": spec, "error": f"{type(error).__name__}: {error}"[:500]}
        records.append(record)
        append(args.out, record)
        return record

    shared = {
        "base": args.model, "steps": args.steps, "batch": args.batch, "rank": args.rank, "held": args.held,
        "max_length": args.max_length, "dtype": args.dtype,
    }  # fmt: skip
    final = []
    for task in trained:
        for method in args.methods.split(","):
            choices: list[float | None] = list(rates.get(method, []))
            if not choices:
                choices = [None if method == "ctr" else plans.package_rate(method)]
            spec = {**shared, "task": task, "method": method, "evaluate": args.held, "seed": plans.TUNING_SEED}
            losses = {r: run({**spec, "lr": r}).get("loss", math.inf) for r in choices} if len(choices) > 1 else {}
            rate = min(losses, key=losses.__getitem__) if losses else choices[0]
            test = {"split": "test", "evaluate": args.evaluate, "score": score_of(args.data, task), "lr": rate}
            also = tested if task == source else []
            final += [run({**spec, **test, "also": also, "seed": seed}) for seed in range(args.seeds)]
    for key, rows in sorted(report.group(r for r in final if "loss" in r).items(), key=str):
        print("\n".join(["", f"### {key[1]}, rank {key[2]}, {key[3]} steps of {key[4]}", "", *report.table(rows)]))
    print("\n".join(report.failures(final)))


if __name__ == "__main__":
    main()
