"""Execute a plan on every GPU, or on the CPU; write one JSON line per run and skip finished runs.

    python -m benchmarks.real run PLAN.json --data DIR --model DIR --out FILE.jsonl [--gpus all] [--per-gpu 6]
        [--limit-s S]

A stopped command loses only the runs in progress; calling it again resumes the plan. With --limit-s, the command ends
after that time and starts no run that would exceed it. benchmarks/real/specs.py documents the keys of a run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.run import append
from benchmarks.real import data
from benchmarks.real.pool import GUESS, Pace, Pool, Result
from benchmarks.real.prepare import DEFAULT
from benchmarks.real.specs import Spec, complete, cost, key_of, tasks_of

NO_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")
PACKAGES = ("torch", "transformers", "peft", "ctr_optim")


def versions(device: str, processes: int) -> dict[str, Any]:
    """Return the versions and the device of a run."""
    from importlib.metadata import PackageNotFoundError, version

    import ctr_optim

    found: dict[str, Any] = {"python": platform.python_version(), "processes": processes}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ctr_optim.__version__ if package == "ctr_optim" else None
    kind = torch.device(device)
    found["device"] = torch.cuda.get_device_name(kind) if kind.type == "cuda" else platform.processor() or "cpu"
    found["tf32"] = kind.type == "cuda"
    return found


def attempt(spec: Spec, base: Any, store: data.Store, device: torch.device) -> Result:
    """Return the record of a run, or its error."""
    from benchmarks.real.train import train

    return attempt_with(lambda: train(spec, base, store, device))


def attempt_with(work: Callable[[], Result]) -> Result:
    """Return the result of ``work``, or its error, so that one failed run does not stop the others."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {error}"[:300], "out_of_memory": True}
    except Exception as error:
        if any(mark in str(error) for mark in NO_MEMORY):  # from libraries that do not use torch's allocator
            return {"error": f"out of memory: {error}"[:300], "out_of_memory": True}
        where = traceback.format_exc().strip().splitlines()[-3:-1]
        return {"error": f"{type(error).__name__}: {error}"[:600], "where": " ".join(where)[-300:]}


def serve(
    device: str, pipe: Connection, folder: str, data_folder: str, cache: str, processes: int, threads: int
) -> None:
    """Run as a worker process: load the model, then run the specs that arrive over the pipe."""
    kind = prepared(device, threads)
    base, tokenizer = data.load(folder, "float32", kind)
    store = data.Store(data_folder, tokenizer, cache)

    def result_of(spec: Spec) -> Result:
        nonlocal base
        if spec["dtype"] != "float32":
            base, _ = data.load(folder, spec["dtype"], kind)
        return attempt(spec, base, store, kind)

    answer(pipe, result_of, kind, processes)


def prepared(device: str, threads: int) -> torch.device:
    """Set up a worker process without network access and progress bars, and return its device."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import logging
    from transformers.utils.logging import disable_progress_bar

    logging.set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(threads)
    kind = torch.device(device)
    if kind.type == "cuda":
        torch.cuda.set_device(kind)
        torch.set_float32_matmul_precision("high")  # TF32
    return kind


def answer(pipe: Connection, result_of: Callable[[Spec], Result], kind: torch.device, processes: int) -> None:
    """Send the result of every spec that arrives over the pipe, until it closes or CUDA fails."""
    known = versions(str(kind), processes)
    pipe.send("ready")
    while True:
        try:
            spec = pipe.recv()
        except (EOFError, OSError):
            return
        result = result_of(spec)
        broken = "CUDA error" in result.get("error", "")
        if kind.type == "cuda" and not broken:
            torch.cuda.empty_cache()  # The other processes on the GPU need the memory.
        pipe.send({**result, "versions": known})
        if broken:
            return  # A process cannot use CUDA after such an error; the parent starts another process.


def read(paths: Iterable[str | Path], complete: Callable[[Spec], Spec] = complete) -> list[dict[str, Any]]:
    """Return the records of results files with complete specifications, without truncated lines."""
    records = []
    for path in paths:
        for line in Path(path).read_text().splitlines() if os.path.exists(path) else []:
            try:
                record = json.loads(line)
                record["spec"] = complete(record["spec"])
            except (json.JSONDecodeError, KeyError):
                continue
            records.append(record)
    return records


def devices_of(gpus: str) -> list[str]:
    """Return the devices for ``all``, a number of GPUs, a list such as ``0,2``, or ``none``; without a GPU: the CPU."""
    count = torch.cuda.device_count() if gpus != "none" else 0
    if gpus == "all":
        chosen = list(range(count))
    elif gpus == "none":
        chosen = []
    else:
        chosen = [int(g) for g in gpus.split(",")] if "," in gpus else list(range(min(int(gpus), count)))
    return [f"cuda:{index}" for index in chosen] or ["cpu"]


def work(
    specs: list[Spec], data_folder: str, folder: str, out: str, devices: list[str], each: int, limit: float = math.inf,
    again: bool = False, in_order: bool = False,
) -> int:  # fmt: skip
    """Run a plan and return how many runs are left.

    ``again`` repeats failed runs; ``in_order`` keeps the plan's order instead of starting with the longest runs.
    """
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    began = time.time()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("OMP_NUM_THREADS", "1" if devices != ["cpu"] else str(max(1, (os.cpu_count() or 1) // each)))
    records = read([out])
    done = {key_of(r["spec"]) for r in records if not again or "error" not in r}
    todo = {key_of(s): complete(s) for s in specs if key_of(s) not in done}
    kind = devices[0].partition(":")[0]
    print(f"{len(todo)} of {len(specs)} runs to do on {', '.join(devices)}, {each} at once on each", flush=True)
    if not todo:
        return 0
    counter = {"done": 0}
    pace = Pace(GUESS[kind])
    for record in records:
        if record.get("versions", {}).get("processes") == each * len(devices) and "total_seconds" in record:
            pace.add(record["total_seconds"], cost(record["spec"]))

    def write(spec: Spec, result: Result) -> None:
        append(out, {"spec": spec, **result})
        counter["done"] += 1
        label = " ".join([spec["method"], f"{spec['lr'] or ''}", f"{spec['options'] or ''}", *tasks_of(spec)])
        said = result.get("error") or f"loss {result['loss']:.4f}, text {result.get('text') or math.nan:.3f}"
        print(f"{time.time() - began:6.0f} s  {counter['done']}/{len(todo)}  {label}: {said}", flush=True)

    with tempfile.TemporaryDirectory() as cache:
        store = data.Store(data_folder, AutoTokenizer.from_pretrained(folder), cache)
        for spec in todo.values():
            try:
                store.warm(spec)
            except (OSError, ValueError, KeyError):
                continue  # The run itself reports the error.
        print(f"{time.time() - began:6.0f} s  tokenised", flush=True)
        threads = int(os.environ["OMP_NUM_THREADS"])
        arguments = (folder, data_folder, cache, each * len(devices), threads)
        pool = Pool(serve, arguments, devices, each, write, began + limit, pace, lambda text: print(text, flush=True))
        left = pool.work(list(todo.values()), in_order)
    print(f"{counter['done']} done, {left} left, {time.time() - began:.0f} s", flush=True)
    return left


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", nargs="+", help="JSON files of runs")
    parser.add_argument("--data", required=True, help="folder of tasks")
    parser.add_argument("--model", default=str(DEFAULT), help="folder of the model (default: the folder of `prepare`)")
    parser.add_argument("--out", required=True, help="results file, JSON lines are appended")
    parser.add_argument("--gpus", default="all", help="all, a number, a list such as 0,2, or none")
    parser.add_argument("--per-gpu", type=int, help="processes per device (default: 6 on a GPU, 1 on the CPU)")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="seconds after which the command ends")
    parser.add_argument("--again", action="store_true", help="repeat failed runs")
    parser.add_argument("--in-order", action="store_true", help="keep the plan's order; default: the longest first")
    args = parser.parse_args(arguments)
    if not Path(args.model, "config.json").exists():
        raise SystemExit(f"--model: {args.model} holds no model; create it with `python -m benchmarks.real prepare`")
    specs = [spec for plan in args.plan for spec in json.loads(Path(plan).read_text())]
    devices = devices_of(args.gpus)
    each = args.per_gpu or (1 if devices == ["cpu"] else 6)
    work(specs, args.data, args.model, args.out, devices, each, args.limit_s, args.again, args.in_order)
