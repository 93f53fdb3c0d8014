"""Run many small fine-tunings and write one JSON line for each; finished ones are not repeated.

    python -m benchmarks.quality.run PLAN.json --data DIR --models DIR --out results.jsonl [--workers 14]

PLAN.json is a list of specs; keys left out come from DEFAULTS below. With several workers, processes share the device.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from benchmarks.quality import tasks
from benchmarks.quality.methods import METHODS

DEFAULTS: dict[str, Any] = {
    "method": "ctr", "base": "base5m", "task": "e2e", "lr": None, "rank": 8, "steps": 300, "batch": 32, "seed": 0,
    "options": {}, "split": "validation", "evaluate": 600, "max_length": 256, "curve": 0, "also": [],
}  # fmt: skip


def complete(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec with every key, so that equal runs have equal keys."""
    unknown = set(spec) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"spec: unknown keys {sorted(unknown)}; expected some of {sorted(DEFAULTS)}")
    return {**DEFAULTS, **spec}


def key_of(spec: dict[str, Any]) -> str:
    """Identity of a run."""
    return json.dumps(spec, sort_keys=True)


@lru_cache(maxsize=4)
def _base_and_tokenizer(models: str, base: str):
    path = str(Path(models) / base) if (Path(models) / base).exists() else base
    return (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict(),
        path,
        AutoTokenizer.from_pretrained(path),
    )


@lru_cache(maxsize=16)
def _examples(data: str, models: str, base: str, task: str, split: str, limit: int, max_length: int):
    tokenizer = _base_and_tokenizer(models, base)[2]
    if split == "test":
        examples = tasks.encode(tasks.load_rows(Path(data), task, "test"), tokenizer, max_length)
    else:
        every = tasks.encode(tasks.load_rows(Path(data), task, "train"), tokenizer, max_length)
        train, held = tasks.validation_split(every, limit)
        return train if split == "train" else held
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    return [examples[i] for i in order[:limit]]


def train(spec: dict[str, Any], data: str, models: str, device: torch.device) -> dict[str, Any]:
    """One run: the record that goes into the results file."""
    _, path, _ = _base_and_tokenizer(models, spec["base"])
    torch.manual_seed(spec["seed"])
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    common = (data, models, spec["base"], spec["task"])
    examples = _examples(*common, "train", spec["evaluate"], spec["max_length"])
    held = _examples(*common, spec["split"], spec["evaluate"], spec["max_length"])
    stream = tasks.batches(examples, spec["batch"], spec["steps"] + 64, spec["seed"], device)
    run = METHODS[spec["method"]](base, spec, tasks.batches(examples, spec["batch"], 64, spec["seed"] + 7, device))
    model, optimizer = run.model, run.optimizer
    model.to(device).train()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / spec["steps"])))
    losses, curve, start = [], [], time.time()
    for step in range(spec["steps"]):
        loss = model(**next(stream)).loss
        loss.backward()
        optimizer.step()
        run.after_step(step)
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if spec["curve"] and (step + 1) % spec["curve"] == 0:
            curve.append([step + 1, tasks.loss_per_token(model, held, device)])
    others = {t: _examples(data, models, spec["base"], t, "test", 400, spec["max_length"]) for t in spec["also"]}
    record = {
        "loss": tasks.loss_per_token(model, held, device),
        "train_loss": float(torch.stack(losses[-20:]).mean()),
        "seconds": time.time() - start,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "curve": curve,
        "also": {task: tasks.loss_per_token(model, some, device) for task, some in others.items()},
    }
    if hasattr(optimizer, "metrics"):
        record["metrics"] = {k: v for k, v in optimizer.metrics().items() if not isinstance(v, dict)}
    return record


def _work(queue, out: str, data: str, models: str, lock) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    versions = {"torch": torch.__version__, "python": platform.python_version(), "device": device.type}
    while (spec := queue.get()) is not None:
        try:
            result = train(spec, data, models, device)
        except Exception as error:  # one failed run must not lose the others
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        with lock, open(out, "a") as file:
            file.write(json.dumps({"spec": spec, **result, "versions": versions}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan")
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    specs = [complete(s) for s in json.loads(Path(args.plan).read_text())]
    lines = Path(args.out).read_text().splitlines() if os.path.exists(args.out) else []
    done = {key_of(json.loads(line)["spec"]) for line in lines}
    todo = [s for s in specs if key_of(s) not in done]
    context = mp.get_context("spawn")
    queue, lock = context.Queue(), context.Lock()
    for spec in [*todo, *[None] * args.workers]:
        queue.put(spec)
    workers = [
        context.Process(target=_work, args=(queue, args.out, args.data, args.models, lock)) for _ in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
