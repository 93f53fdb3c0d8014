"""Size and test loss of trained adapters that ``ctr_optim.compress`` and other methods cut, on a real model.

    python -m benchmarks.ranks.compress --model DIR --data DIR --out compress.jsonl --slots 9 --limit-s 400
    python -m benchmarks.ranks.compress --model DIR --data DIR --out timing.jsonl --kinds scheduled,wide --tasks e2e \
        --slots 1                                                       # time per step, alone on the device
    python -m benchmarks.ranks.compress --report compress.jsonl

Each job trains one adapter. Kinds of jobs, in the order in which they run:

- ``cut``: AdamW or CTROptimizer at ``--ranks``. Then the adapter is cut at every tolerance. ``compress`` measures on
  rows held out of training; all results are measured on the test split. The other ways of cutting get the number of
  parameters that ``compress`` left. ``svd`` removes the smallest squared singular values of ``s B A`` per parameter,
  over all layers. ``svd_uniform`` uses the largest rank, equal in all layers, within that number of parameters.
  ``magnitude`` removes trained directions by ``s |b_i| |a_i|``. PEFT's ``convert_to_lora`` makes the same cut as
  ``svd_uniform``; it runs only at the tolerances ``--converting``, because it computes full SVDs of every layer;
- ``scheduled``: CTROptimizer from ``--wide`` with ``RankScheduler(tolerance=)`` and events at every tenth of the
  training up to its default end; ``wide``: the same training without the scheduler;
- ``plain``: AdamW or CTROptimizer at the ranks ``--small``, without a cut;
- ``adalora``: AdaLoRA with AdamW at the ranks ``--adalora``.

Jobs run in ``--slots`` processes per GPU. After each job the program writes one line per result. With ``--limit-s`` it
starts no job that would exceed the time; calling the command again resumes the work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from copy import deepcopy
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.methods import METHODS, Run
from benchmarks.quality.tasks import batches, encode, load_rows, validation_split
from benchmarks.ranks.cutting import Record, cuts
from benchmarks.ranks.table import report
from benchmarks.real.measure import loss_per_token
from benchmarks.real.pool import Pace, Pool
from benchmarks.real.specs import LAUNCH, LENGTHS, SLOWER

Job = dict[str, Any]
KINDS = ("cut", "scheduled", "wide", "plain", "adalora")
RATES = {"e2e": 3.2e-3, "gsm8k": 3.2e-3, "hellaswag": 1.6e-3, "mbpp": 1e-4, "arc_easy": 2e-4, "boolq": 8e-4}
"""AdamW's rates of lowest validation loss at rank 16 (``results/real-h200.jsonl``). AdaLoRA: four times the rate."""
USUAL, ADALORA = 1.6e-3, 4.0
HELD = {"mbpp": 48}  # of 374 rows


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Return every job, in the order of ``KINDS``."""
    plan = {
        "cut": [(method, rank) for rank in args.ranks for method in args.methods],
        "scheduled": [("ctr", args.wide)],
        "wide": [("ctr", args.wide)],
        "plain": [(method, rank) for rank in args.small for method in args.methods],
        "adalora": [("adalora", rank) for rank in args.adalora],
    }
    jobs = []
    for kind in KINDS:
        for seed in range(args.seeds) if kind in args.kinds else ():
            for method, rank in plan[kind]:
                for task in args.tasks:
                    rate = None if method == "ctr" else args.adamw_lr or RATES.get(task, USUAL)
                    job = {"kind": kind, "task": task, "method": method, "seed": seed, "rank": rank, "lr": rate}
                    job |= {"steps": args.steps, "batch": args.batch, "held": min(args.held, HELD.get(task, args.held))}
                    job |= {"evaluate": args.evaluate}
                    if method == "adalora":
                        job["lr"] = ADALORA * rate
                    if kind == "cut":
                        job |= {"tolerances": args.tolerances, "converting": args.converting, "refit": args.refit}
                    if kind == "scheduled":
                        job["tolerances"] = [args.tolerance]
                    jobs.append(job)
    return jobs


def key_of(job: Job) -> str:
    """Return the identity of a job: its JSON."""
    return json.dumps(job, sort_keys=True)


def price(job: Job) -> float:
    """Return the estimated time, in steps of AdamW on 16 rows of 64 tokens."""
    tokens, unit = job["batch"] * LENGTHS.get(job["task"], 100), LAUNCH + 16 * 64
    total = 20.0 + job["steps"] * SLOWER.get(job["method"], 1.0) * (LAUNCH + tokens) / unit
    if job["kind"] == "cut":  # Every way measures test rows; compress searches on held-out rows.
        passes = 2 + len(job["tolerances"]) * 5, 2 + len(job["tolerances"]) * 10
        rows = passes[0] * job["evaluate"] + passes[1] * job["held"] * (1 + job["refit"] / 8)
        total += rows * LENGTHS.get(job["task"], 100) / (3 * unit)
    return total


# -- one job -------------------------------------------------------------------------------------------------------


def serve(device: str, pipe: Connection, folder: str, data: str, slots: int) -> None:
    """Run as a worker process: load the model, then run the jobs that arrive over the pipe."""
    from benchmarks.real.run import answer, attempt_with, prepared

    kind = prepared(device, 1)
    warnings.simplefilter("ignore")
    worker = Worker(folder, Path(data), kind)
    answer(pipe, lambda job: attempt_with(lambda: {"records": worker.run(job)}), kind, slots)


class Worker:
    """Trains and cuts adapters on one device."""

    def __init__(self, folder: str, data: Path, device: torch.device) -> None:
        from benchmarks.real.data import load

        self.base, self.tokenizer = load(folder, "float32", device)
        self.data, self.device = data, device

    def run(self, job: Job) -> list[Record]:
        """Train one adapter and cut it if the job is a ``cut``; return one record per result."""
        from ctr_optim.model.registry import find_pairs

        began = time.time()
        torch.manual_seed(job["seed"])
        rows = {split: load_rows(self.data, job["task"], split) for split in ("train", "test")}
        train, held = validation_split(encode(rows["train"], self.tokenizer), job["held"])
        test = encode(rows["test"][: job["evaluate"]], self.tokenizer)
        run = self.built(job)
        times = self.train(job, run, train)
        if hasattr(run.optimizer, "close"):
            run.optimizer.close()
        model, run.optimizer = run.model, None
        if self.device.type == "cuda":
            times["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        times["train_seconds"] = round(time.time() - began, 2)
        if job["kind"] == "cut":
            records = cuts(model, held, test, job["tolerances"], job["converting"], self.device, job["refit"])
        else:
            loss = loss_per_token(model, test, self.device)
            records = [{"way": job["kind"], "loss": loss, "parameters": 0}]
            if job["method"] == "adalora":
                records[0]["parameters"] = adalora_parameters(model)
            else:
                pairs = find_pairs(model)
                records[0]["parameters"] = sum(pair.rank * pair.cost for pair in pairs)
                records[0]["ranks"] = sorted(pair.rank for pair in pairs)
        return [{**record, **times} for record in records]

    def built(self, job: Job) -> Run:
        """Return the model with its adapter, and the optimizer."""
        options: dict[str, Any] = {}
        if job["kind"] == "scheduled":
            options["rank_scheduler"] = {"tolerance": job["tolerances"][0], "interval": max(1, job["steps"] // 10)}
        spec = {"rank": job["rank"], "steps": job["steps"], "lr": job["lr"], "options": options}
        run = METHODS[job["method"]](deepcopy(self.base), spec, iter(()))
        run.model.to(self.device).train()
        return run

    def train(self, job: Job, run: Run, train: list[Any]) -> Record:
        """Train; return milliseconds per step, overall and by quarter of the training."""
        steps, cuda = job["steps"], self.device.type == "cuda"
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, steps)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        marks = [time.perf_counter()]
        for step, data in enumerate(batches(train, job["batch"], steps, job["seed"], self.device), 1):
            run.model(**data).loss.backward()
            run.optimizer.step()
            run.after_step(step - 1)
            run.optimizer.zero_grad()
            schedule.step()
            if step % max(1, math.ceil(steps / 4)) == 0 or step == steps:
                if cuda:
                    torch.cuda.synchronize(self.device)
                marks.append(time.perf_counter())
        quarter = max(1, math.ceil(steps / 4))
        each = [1e3 * (b - a) / quarter for a, b in pairwise(marks)]
        return {"ms_by_quarter": each, "ms_per_step": 1e3 * (marks[-1] - marks[0]) / steps}


def adalora_parameters(model: Any) -> int:
    """Return the parameters of the directions that AdaLoRA kept, those with nonzero singular values."""
    total = 0
    for module in model.modules():
        if hasattr(module, "lora_E") and "default" in module.lora_E:
            kept = int((module.lora_E["default"] != 0).sum())
            total += kept * (module.lora_A["default"].shape[1] + module.lora_B["default"].shape[0] + 1)
    return total


# -- all jobs ------------------------------------------------------------------------------------------------------


def read(path: str) -> list[Record]:
    """Return the records of a results file, without truncated lines."""
    records = []
    for line in Path(path).read_text().splitlines() if os.path.exists(path) else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def work(args: argparse.Namespace) -> None:
    """Run the jobs that the results file does not hold yet."""
    from benchmarks.real.run import devices_of

    began = time.time()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    jobs = jobs_of(args)
    done = {key_of(r["job"]) for r in read(args.out) if not (args.again and "error" in r)}
    todo = [job for job in jobs if key_of(job) not in done]
    devices, count = devices_of("all"), 0
    print(f"{len(todo)} of {len(jobs)} jobs to do on {', '.join(devices)}, {args.slots} at once on each", flush=True)

    def write(job: Job, result: Record) -> None:
        nonlocal count
        count += 1
        common = {"job": job, "versions": result.get("versions")}
        records = result.get("records") or [{"error": result["error"], "where": result.get("where")}]
        with open(args.out, "a") as out:
            out.writelines(json.dumps({**record, **common}) + "\n" for record in records)
        said = result.get("error") or f"loss {records[0]['loss']:.4f}, {len(records)} lines"
        label = f"{job['kind']} {job['method']} r={job['rank']} {job['task']} seed {job['seed']}"
        print(f"{time.time() - began:6.0f} s  {count}/{len(todo)}  {label}: {said}", flush=True)

    pace = Pace(0.35 if devices != ["cpu"] else 2.5)
    arguments, deadline = (args.model, args.data, args.slots * len(devices)), began + args.limit_s
    pool = Pool(
        serve, arguments, devices, args.slots, write, deadline, pace, lambda text: print(text, flush=True), price
    )
    left = pool.work(todo, in_order=True) if todo else 0
    print(f"{count} done, {left} left, {time.time() - began:.0f} s", flush=True)


def numbers(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the base model")
    parser.add_argument("--data", help="folder with TASK/train.jsonl and TASK/test.jsonl")
    parser.add_argument("--out", help="results file, JSON lines are appended")
    parser.add_argument("--report", help="only print tables of these results")
    parser.add_argument("--kinds", type=numbers(str), default=KINDS, help=", ".join(KINDS))
    parser.add_argument("--tasks", type=numbers(str), default=["e2e", "gsm8k", "hellaswag", "mbpp", "arc_easy"])
    parser.add_argument("--methods", type=numbers(str), default=["adamw", "ctr"])
    parser.add_argument("--ranks", type=numbers(int), default=[16])
    parser.add_argument("--small", type=numbers(int), default=[2, 4, 1, 8], help="ranks of the small adapters")
    parser.add_argument("--adalora", type=numbers(int), default=[2, 4], help="ranks of AdaLoRA")
    parser.add_argument("--wide", type=int, default=32, help="starting rank of `scheduled`, rank of `wide`")
    parser.add_argument("--tolerance", type=float, default=0.01, help="tolerance of `scheduled`")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tolerances", type=numbers(float), default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--converting", type=numbers(float), default=[1e-2], help="tolerances for convert_to_lora")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held", type=int, default=128, help="largest number of held-out rows for compress")
    parser.add_argument("--evaluate", type=int, default=200, help="test rows")
    parser.add_argument("--adamw-lr", type=float, help="AdamW's rate on every task (default: tuned rates)")
    parser.add_argument("--refit", type=int, default=0, help="refit steps after a cut")
    parser.add_argument("--slots", type=int, default=9, help="processes on each GPU")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="seconds after which the command ends")
    parser.add_argument("--again", action="store_true", help="repeat failed jobs")
    args = parser.parse_args()
    if args.report:
        print(report(read(args.report)))
        return
    if not (args.model and args.data and args.out):
        parser.error("expected --model, --data and --out, or --report")
    work(args)


if __name__ == "__main__":
    main()
