"""Train every run of a plan with GRPO: one JSON line for each run; finished runs are not repeated.

    python -m benchmarks.rl run --data DIR --out FILE.jsonl [--plan grpo,iterations] [--per-gpu 8] [--limit-s S]

DIR holds ``gsm8k/train.jsonl`` and ``wikitext2/test.txt``. ``python -m benchmarks.real prepare`` makes the model. The
same command goes on where it stopped. Keys of a run: see benchmarks/rl/specs.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.quality.run import append
from benchmarks.real import data
from benchmarks.real.pool import Pace, Pool, Result
from benchmarks.real.prepare import DEFAULT
from benchmarks.real.run import answer, attempt_with, devices_of, prepared
from benchmarks.real.run import read as records_of
from benchmarks.rl.specs import Spec, complete, key_of, plans, price

GUESS = {"cuda": 0.25, "cpu": 8.0}  # seconds for a unit of price before anything is known


def serve(device: str, pipe: Connection, folder: str, data_folder: str, processes: int, threads: int) -> None:
    """Load the model, then train the runs that come over the pipe."""
    from benchmarks.rl.grpo import train

    kind = prepared(device, threads)
    base, tokenizer = data.load(folder, "float32", kind)
    store = data.Store(data_folder, tokenizer)
    answer(pipe, lambda spec: attempt_with(lambda: train(spec, base, store, kind)), kind, processes)


def read(paths: list[str]) -> list[dict[str, Any]]:
    """Return the records of results files with complete specifications, without truncated lines."""
    return records_of(paths, complete)


def label(spec: Spec) -> str:
    """Return a run's method in a few words."""
    options = " ".join(f"{k}={v}" for k, v in spec["options"].items())
    name = "CTROptimizer" if spec["method"] == "ctr" else "AdamW" if spec["method"] == "adamw" else spec["method"]
    return " ".join(part for part in (name, "" if spec["lr"] is None else f"{spec['lr']:g}", options) if part)


def work(
    specs: list[Spec], data_folder: str, folder: str, out: str, devices: list[str], each: int, limit: float = math.inf,
    again: bool = False,
) -> int:  # fmt: skip
    """Train a plan's runs; return how many are left. ``again``: failed runs are repeated, too."""
    began, records = time.time(), read([out])
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("OMP_NUM_THREADS", "1" if devices != ["cpu"] else str(max(1, (os.cpu_count() or 1) // each)))
    done = {key_of(r["spec"]) for r in records if not again or "error" not in r}
    todo = {key_of(s): complete(s) for s in specs if key_of(s) not in done}
    print(f"{len(todo)} of {len(specs)} runs to do on {', '.join(devices)}, {each} at once on each", flush=True)
    if not todo:
        return 0
    pace = Pace(GUESS[devices[0].partition(":")[0]])
    for record in records:
        if record.get("versions", {}).get("processes") == each * len(devices) and "total_seconds" in record:
            pace.add(record["total_seconds"], price(record["spec"]))

    def write(spec: Spec, result: Result) -> None:
        append(out, {"spec": spec, **result})
        said = result.get("error") or (
            f"accuracy {result['curve'][0][1]:.3f} to {result['accuracy']:.3f}, "
            f"{result['seconds_per_update']:.2f} s an update"
        )
        print(f"{time.time() - began:6.0f} s  {label(spec)}, {spec['passes']} passes: {said}", flush=True)

    arguments = (folder, data_folder, each * len(devices), int(os.environ["OMP_NUM_THREADS"]))
    say = lambda text: print(text, flush=True)  # noqa: E731
    left = Pool(serve, arguments, devices, each, write, began + limit, pace, say, price).work(list(todo.values()))
    print(f"{left} left, {time.time() - began:.0f} s", flush=True)
    return left


def main(arguments: list[str]) -> None:
    known = plans()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", default="grpo", help=f"names with commas between: {', '.join(known)}, or all")
    parser.add_argument("--spec", help="keys of one run as JSON, in place of a plan")
    parser.add_argument("--data", required=True, help="folder of tasks")
    parser.add_argument("--model", default=str(DEFAULT), help="folder of the model (default: where prepare writes it)")
    parser.add_argument("--out", required=True, help="results, JSON lines, appended to")
    parser.add_argument("--gpus", default="all", help="all, a number, a list such as 0,2, or none")
    parser.add_argument("--per-gpu", type=int, help="processes on each (default: 8 on a GPU, 1 on the CPU)")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="seconds after which the command ends")
    parser.add_argument("--again", action="store_true", help="repeat runs that failed")
    args = parser.parse_args(arguments)
    if not Path(args.model, "config.json").exists():
        raise SystemExit(f"--model: {args.model} holds no model; make it with `python -m benchmarks.real prepare`")
    names = list(known) if args.plan == "all" else args.plan.split(",")
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"--plan: got {unknown}, expected some of {sorted(known)}")
    specs = [json.loads(args.spec)] if args.spec else [spec for name in names for spec in known[name]]
    devices = devices_of(args.gpus)
    each = args.per_gpu or (1 if devices == ["cpu"] else 8)
    work(specs, args.data, args.model, args.out, devices, each, args.limit_s, args.again)
