"""Fine-tune the real model on a slice of the bundled task, in about 15 minutes on two CPU cores.

    make demo-real                                   # or: python -m benchmarks.real demo

The runs are AdamW at two rates, CTROptimizer at its defaults, and CTROptimizer with ``retain="self"``. All runs use the
same batches. Forgetting is the rise of the loss on docstrings of Python's own modules, which every machine has.
"""

from __future__ import annotations

import argparse
import inspect
import shutil
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import generation
from benchmarks.real import data, measure, prepare
from benchmarks.real.specs import Spec, complete
from benchmarks.real.train import train
from ctr_optim import CTROptimizer

ASSETS = Path(__file__).resolve().parents[2] / "examples" / "assets"
MODULES = [
    "argparse", "bisect", "calendar", "collections.abc", "concurrent.futures", "contextlib", "datetime", "decimal",
    "difflib", "doctest", "enum", "fractions", "functools", "gettext", "heapq", "html", "inspect", "json", "locale",
    "logging", "optparse", "pdb", "pickle", "pprint", "queue", "random", "re", "sched", "shelve", "shlex",
    "socketserver", "statistics", "string", "subprocess", "textwrap", "threading", "timeit", "tokenize",
    "traceback", "turtle", "unittest", "urllib.request", "uuid", "wave", "weakref", "xml.etree.ElementTree",
    "zipfile",
]  # fmt: skip
SAMPLES = 3


def prose() -> str:
    """Return docstrings of Python's modules and of their public classes and functions: technical English."""
    parts, seen = [], set()
    for name in MODULES:
        module = import_module(name)
        public = [getattr(module, n, None) for n in sorted(vars(module)) if not n.startswith("_")]
        for thing in [module, *(x for x in public if inspect.isclass(x) or inspect.isfunction(x))]:
            text = inspect.getdoc(thing) or ""
            if len(text) > 200 and text not in seen and ">>>" not in text:
                seen.add(text)
                parts.append(text[:500])  # Short parts let the first pieces cover many modules.
    return "\n\n".join(parts)


def folder(root: Path, text: str) -> Path:
    """Create a folder of tasks with the bundled task and the text, and return it."""
    shutil.copytree(ASSETS / "e2e", root / "e2e")
    (root / "docstrings").mkdir()
    (root / "docstrings" / "test.txt").write_text(text, encoding="utf-8")
    return root


def plan(steps: int, batch: int, seed: int) -> dict[str, Spec]:
    """Return the specs of the runs by their names in the table."""
    shared: Spec = {
        "task": "e2e", "steps": steps, "batch": batch, "seed": seed, "held": 0, "evaluate": 60, "domains": [],
        "text": {"task": "docstrings", "split": "test", "pieces": 12, "length": 128},
    }  # fmt: skip
    runs = {f"AdamW {rate:g}": {**shared, "method": "adamw", "lr": rate} for rate in (2e-4, 2e-3)}
    runs["CTROptimizer"] = {**shared, "retain": "none"}
    runs['CTROptimizer, retain="self"'] = {**shared, "retain": "self"}
    if "retain" not in inspect.signature(CTROptimizer).parameters:
        runs["CTROptimizer"] = shared
        del runs['CTROptimizer, retain="self"']
    return {name: complete(spec) for name, spec in runs.items()}


def table(rows: list[tuple[str, dict[str, Any]]], base: dict[str, float]) -> list[str]:
    """Return the lines of the comparison table."""
    lines = [f"{'':30}{'test loss':>10}{'forgetting':>12}{'seconds':>9}"]
    lines.append(f"{'before training':30}{base['loss']:10.3f}{0.0:+12.3f}")
    for name, record in rows:
        lines.append(f"{name:30}{record['loss']:10.3f}{record['text'] - base['text']:+12.3f}{record['seconds']:9.0f}")
    return lines


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=prepare.DEFAULT, help="folder of the model; created if absent")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15, help="start no run that would exceed this time")
    args = parser.parse_args(arguments)
    from transformers import logging
    from transformers.utils.logging import disable_progress_bar

    logging.set_verbosity_error()
    disable_progress_bar()
    if not prepare.prepared(args.model):
        print(f"fetching {prepare.PACKAGE} ...", flush=True)
        prepare.prepare(args.model)
    began, device = time.time(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = data.load(str(args.model), "float32", device)
    with tempfile.TemporaryDirectory() as root:
        store = data.Store(folder(Path(root), prose()), tokenizer)
        runs = plan(args.steps, args.batch, args.seed)
        first = next(iter(runs.values()))
        test = store.test(first, "e2e")
        prompts = list(dict.fromkeys(e.row["prompt"] for e in test))[:SAMPLES]

        def write(model: Any) -> dict[str, Any]:
            return {"samples": generation.generate(model, tokenizer, prompts, new_tokens=40)}

        before = {
            "loss": measure.loss_per_token(base, test, device),
            "text": measure.loss_per_token(base, store.text(first["text"]), device),
        }
        print(f"{args.steps} steps of {args.batch} rows of E2E on {device}; losses in nats per token\n", flush=True)
        rows: list[tuple[str, dict[str, Any]]] = []
        slowest = 0.0
        for name, spec in runs.items():
            if time.time() - began + 1.3 * slowest > 60 * args.minutes:
                print(f"{name}: skipped, it would not finish within {args.minutes:g} minutes")
                continue
            record = train(spec, base, store, device, look=write)
            slowest = max(slowest, record["total_seconds"])
            rows.append((name, record))
            print(f"{name}: done in {record['total_seconds']:.0f} s", flush=True)
        print("\n" + "\n".join(table(rows, before)) + "\n")
        written = [("before training", write(base)["samples"]), *((name, r["samples"]) for name, r in rows)]
        for index, prompt in enumerate(prompts):
            print(prompt.strip())
            for name, texts in written:
                print(f"  {name:30}{' '.join(texts[index].split())}")
    if len(runs) < 4:
        print('\nThis version of ctr_optim has no `retain=`. A version with it also runs retain="self".')
    print(f"\n{time.time() - began:.0f} s in all")
