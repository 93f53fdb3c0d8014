"""Run many small fine-tunings; write one JSON line per run and skip finished runs.

    python -m benchmarks.quality.run PLAN.json --data DIR --models DIR --out results.jsonl [--workers N] [--limit-s S]

PLAN.json is a list of specs; missing keys take their values from ``plans.DEFAULTS``. Several workers share the device.
Each run writes its line in one write when it ends. A stopped command loses only the runs in progress; calling it again
resumes the plan. With ``--limit-s``, the program starts no run that would exceed the time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from benchmarks.quality import generation, tasks
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plans import complete, cost, key_of

PROMPTS = 200  # number of texts generated for a score


@lru_cache(maxsize=2)
def _base(models: str, name: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """Return a base model and its tokenizer from a folder of ``models``, a path, or the hub. Runs train copies."""
    path = str(Path(models) / name) if (Path(models) / name).exists() else name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device)
    return model.requires_grad_(True), AutoTokenizer.from_pretrained(path)


@lru_cache(maxsize=16)
def _examples(
    data: str, tokenizer: Any, task: str, split: str, limit: int, max_length: int, held: int = 0
) -> list[tasks.Example]:
    folder = Path(data)
    if not (folder / task / "train.jsonl").exists() and (folder / task / "test.txt").exists():
        return tasks.encode_text((folder / task / "test.txt").read_text(), tokenizer, max_length)[:limit]
    if split == "test":
        examples = tasks.encode(tasks.load_rows(folder, task, "test"), tokenizer, max_length)
    else:
        every = tasks.encode(tasks.load_rows(folder, task, "train"), tokenizer, max_length)
        train, validation = tasks.validation_split(every, held)
        if split == "train":
            return train
        examples = validation
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    return [examples[i] for i in order[:limit]]


def score(names: list[str], model: Any, base: Any, tokenizer: Any, held: list[tasks.Example]) -> dict[str, float]:
    """Return the named scores on the evaluated examples: accuracy, overlap, exact_match or kl_from_base."""
    device = next(model.parameters()).device
    rows = [e.row for e in held]
    scores: dict[str, float] = {}
    for name in names:
        if name == "accuracy":
            scores[name] = tasks.choice_accuracy(model, rows, tokenizer, device)
        elif name == "overlap":
            references = generation.group_references(rows, PROMPTS)
            texts = generation.generate(model, tokenizer, list(references), new_tokens=80)
            scores |= generation.overlap(texts, list(references.values()))
        elif name == "exact_match":
            texts = generation.generate(model, tokenizer, [r["prompt"] for r in rows[:PROMPTS]], new_tokens=200)
            scores[name] = generation.exact_match(texts, [r["target"] for r in rows[:PROMPTS]])
        elif name == "kl_from_base":
            scores[name] = tasks.kl_per_token(base, model, held, device)
        else:
            raise ValueError(f"score: got {name!r}, expected accuracy, overlap, exact_match or kl_from_base")
    return scores


def train(spec: dict[str, Any], data: str, models: str, device: torch.device) -> dict[str, Any]:
    """Run a spec and return its record for the results file."""
    base, tokenizer = _base(models, spec["base"], spec["dtype"], device)
    steps, size, seed, length = spec["steps"], spec["batch"], spec["seed"], spec["max_length"]
    examples = _examples(data, tokenizer, spec["task"], "train", 0, length, spec["held"])
    held = _examples(data, tokenizer, spec["task"], spec["split"], spec["evaluate"], length, spec["held"])
    stream = tasks.batches(examples, size, steps, seed, device)
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.time()
    run = METHODS[spec["method"]](deepcopy(base), spec, tasks.batches(examples, size, 64, seed + 7, device))
    model, optimizer = run.model, run.optimizer
    model.to(device).train()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / max(1, steps))))
    setup = time.time() - began
    losses, curve, start, paused = [], [], time.time(), 0.0
    for step in range(steps):
        loss = model(**next(stream)).loss
        loss.backward()
        optimizer.step()
        run.after_step(step)
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if spec["curve"] and (step + 1) % spec["curve"] == 0:
            pause = time.time()
            curve.append([step + 1, tasks.loss_per_token(model, held, device)])
            paused += time.time() - pause
    train_loss = float(torch.stack(losses[-20:]).mean()) if losses else math.nan  # waits for the device
    seconds = time.time() - start - paused
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    metrics = optimizer.metrics() if hasattr(optimizer, "metrics") and steps else {}
    model = run.finish() if run.finish is not None else model
    also = {task: _examples(data, tokenizer, task, "test", 400, length) for task in spec["also"]}
    return {
        "loss": tasks.loss_per_token(model, held, device),
        "train_loss": train_loss,
        "seconds": round(seconds, 2),
        "setup_seconds": round(setup, 2),
        "total_seconds": round(time.time() - began, 2),
        "peak_bytes": peak,
        "parameters": parameters,
        "curve": curve,
        "also": {task: tasks.loss_per_token(model, some, device) for task, some in also.items()},
        "also_accuracy": {
            task: tasks.choice_accuracy(model, [e.row for e in some], tokenizer, device)
            for task, some in also.items()
            if "accuracy" in spec["score"] and "choices" in some[0].row
        },
        "score": score(spec["score"], model, base, tokenizer, held),
        "metrics": {k: v for k, v in metrics.items() if not isinstance(v, dict)},
    }


def finished(out: str) -> set[str]:
    """Return the keys of the runs in a results file, including failed runs, without truncated lines."""
    done = set()
    for line in Path(out).read_text().splitlines() if os.path.exists(out) else []:
        try:
            done.add(key_of(json.loads(line)["spec"]))
        except json.JSONDecodeError:
            continue
    return done


def append(out: str, record: dict[str, Any]) -> None:
    """Append one line in one write, so that several processes can share the file."""
    handle = os.open(out, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(handle, (json.dumps(record) + "\n").encode())
    os.close(handle)


def _work(queue: Any, out: str, data: str, models: str, deadline: float) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    versions = {"torch": torch.__version__, "python": platform.python_version(), "device": device.type}
    pace = 0.0  # seconds per unit of estimated cost of the slowest run so far, without loading
    while (spec := queue.get()) is not None:
        if time.time() + pace * cost(spec) > deadline:
            continue
        try:
            result = train(spec, data, models, device)
        except Exception as error:  # One failed run must not stop the others.
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        if device.type == "cuda":
            torch.cuda.empty_cache()  # The other processes on the GPU need the memory.
        pace = max(pace, result.get("total_seconds", 0.0) / cost(spec))
        append(out, {"spec": spec, **result, "versions": versions})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", nargs="+", help="JSON files of specs, run in this order")
    parser.add_argument("--data", required=True, help="folder of tasks")
    parser.add_argument("--models", required=True, help="folder of base models")
    parser.add_argument("--out", required=True, help="results file, JSON lines are appended")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="seconds after which the command ends")
    args = parser.parse_args()
    deadline = time.time() + args.limit_s
    specs = [complete(s) for plan in args.plan for s in json.loads(Path(plan).read_text())]
    done = finished(args.out)
    todo = {key_of(s): s for s in specs if key_of(s) not in done}
    print(f"{len(todo)} of {len(specs)} runs to do, cost {sum(map(cost, todo.values())):.0f}", flush=True)
    context = mp.get_context("spawn")
    queue = context.Queue()
    for spec in [*todo.values(), *[None] * args.workers]:
        queue.put(spec)
    workers = [
        context.Process(target=_work, args=(queue, args.out, args.data, args.models, deadline), daemon=True)
        for _ in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(None if deadline == math.inf else max(0.0, deadline - time.time()))
    for worker in workers:
        worker.terminate()  # A run whose estimate was too low may still be in progress.
    queue.cancel_join_thread()
    print(f"{len(todo) - len(set(todo) - finished(args.out))} done, {len(set(todo) - finished(args.out))} left")


if __name__ == "__main__":
    main()
