"""Every framework that trains here: measured KL of each step over its bound, and parameters without a bound.

    python -m benchmarks.trust.frameworks --only torchtune        # in the environment that has torchtune
    python -m benchmarks.trust.frameworks --only "" --table docs/integrations.md

Frameworks want versions of transformers, PEFT and torchao that exclude one another: run this once in each environment.
A case whose framework is not installed is left out; a case that was measured replaces its line in the file. Cells of
the matrix (benchmarks/results/trust-matrix.jsonl: LoRA, loss form "attached") are taken over as they are.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.trust import framework_cases as driven
from benchmarks.trust import framework_parts as parts
from benchmarks.trust import trainer_cases as trainers

RESULTS = Path(__file__).parents[1] / "results"
FILE, MATRIX = RESULTS / "frameworks-cpu.jsonl", RESULTS / "trust-matrix.jsonl"
BEGIN, END = "<!-- frameworks: begin -->", "<!-- frameworks: end -->"
STEPS = 30


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        framework: as the page names it.
        how: what was driven.
        package: the distribution that must be installed, and whose version is noted.
        run: takes the number of steps and an empty folder.
    """

    framework: str
    how: str
    package: str
    run: Callable[[int, Path], driven.Observer]
    note: str = ""


KERNELS = {"lora_mlp_kernel": False, "lora_qkv_kernel": True, "lora_o_kernel": True}
PLAIN = {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
CASES = (
    Case("transformers Trainer", "`attach`, gradient checkpointing, bf16", "transformers", trainers.checkpointed_bf16),
    Case("transformers Trainer", "`attach`, `torch_compile`, backend `eager`", "transformers", trainers.compiled),
    Case("transformers Trainer", "`attach`, 4 micro-batches a step", "transformers", trainers.accumulated),
    Case("Accelerate", "4 micro-batches a step, bf16", "accelerate", trainers.accelerated),
    Case("TRL GRPO", "`num_iterations=4`", "trl", partial(trainers.grpo, num_iterations=4)),
    Case("TRL GRPO", "`num_iterations=4`, 2 micro-batches a step", "trl",
         partial(trainers.grpo, num_iterations=4, gradient_accumulation_steps=2)),
    Case("TRL Reward", "`attach`", "trl", trainers.reward, "one score a sequence: a Gaussian of unit variance"),
    Case("torchtune", "its recipe for one device, the YAML of the examples", "torchtune", driven.torchtune,
         "loss in chunks"),
    Case("axolotl", "`do_train` with the plugin, plain LoRA", "axolotl", partial(driven.axolotl, **PLAIN)),
    Case("axolotl", "`do_train` with the plugin, fused q, k, v, o", "axolotl", partial(driven.axolotl, **KERNELS),
         "the fused MLP kernel wants a GPU"),
    Case("LLaMA-Factory, version 0", "`install`, `run_exp`, SFT", "llamafactory", driven.llamafactory_v0),
    Case("LLaMA-Factory, version 1", "`run_sft`, `optim_config`", "llamafactory", driven.llamafactory_v1),
    Case("ms-swift", "`swift sft` with the plugin", "ms-swift", driven.swift),
    Case("NeMo Automodel", "LoRA layers, loss, `build_optimizer`; modules", "nemo-automodel",
         partial(parts.nemo, fused=False), "the recipe wants CUDA"),
    Case("NeMo Automodel", "the same; memory-efficient LoRA, its default", "nemo-automodel", parts.nemo,
         "A and B are never called as modules"),
    Case("torchtitan", "Llama 3 with its `LoRAConverter`, container, schedule", "torchtitan", parts.torchtitan,
         "dense attention stands in for FlexAttention, which has no backward on the CPU"),
    Case("torchtitan", "the same; `ChunkedLossWrapper`, its default", "torchtitan",
         partial(parts.torchtitan, chunked=True), "the forward ends before the last layer"),
    Case("Unsloth", "PEFT's layers through its `LoRA_W`", "unsloth", parts.unsloth,
         "the fused MLP kernel wants a GPU"),
    Case("DeepSpeed", "engine without ZeRO, float32", "deepspeed", parts.deepspeed,
         "ZeRO 1, 2 and 3, and fp16 or bf16 engines, are refused at the first step"),
)  # fmt: skip


def installed(case: Case) -> str | None:
    """The version of a case's framework; None where it is not installed."""
    try:
        return version(case.package)
    except PackageNotFoundError:
        module = case.package.replace("-", "_")
        return None if importlib.util.find_spec(module) is None else str(importlib.import_module(module).__version__)


def measure(case: Case, steps: int) -> dict[str, Any]:
    """Train one case; a crash is a result."""
    record: dict[str, Any] = {"framework": case.framework, "how": case.how, "package": case.package}
    record |= {"version": installed(case), "torch": torch.__version__, "note": case.note}
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            observer = case.run(steps, Path(folder))
    except Exception as error:
        text = " ".join(str(error).split())
        return {**record, "crash": f"{type(error).__name__}: {text}"[:300]}
    meter, optimizer = observer.meter, observer.optimizer
    assert meter is not None and optimizer is not None, "no step was seen"
    said = optimizer.metrics()
    return {
        **record, "steps": optimizer.steps, "measured_steps": len(meter.ratios), "source": meter.source,
        "median": statistics.median(meter.ratios), "largest": max(meter.ratios),
        "unbounded_parameters": said["trust/unbounded"], "skipped_steps": said["skipped_steps"],
        "first_loss": observer.losses[0], "last_loss": statistics.fmean(observer.losses[-5:]),
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def key(record: dict[str, Any]) -> tuple[str, str]:
    """What a line is about."""
    return record["framework"], record["how"]


def from_matrix() -> list[dict[str, Any]]:
    """The matrix' cells of LoRA under every wrapper."""
    names = {"none": "plain loop", "Trainer": "transformers Trainer"}
    found = []
    for cell in map(json.loads, MATRIX.read_text(encoding="utf-8").splitlines()):
        if cell["adapter"] == "lora" and cell["form"] == "attached" and "median" in cell:
            name = names.get(cell["wrapper"], cell["wrapper"])
            framework, _, order = name.partition(", ")
            unbounded = "all" if cell["unbounded_steps"] or cell["source"] != "measured" else 0
            found.append({"framework": framework, "how": "matrix" + (f", {order}" if order else ""),
                          "unbounded_parameters": unbounded, "version": None, **cell})  # fmt: skip
    return found


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, one line a case, the cases of one framework together."""
    lines = ["| framework | how it was tried | version | median | worst | parameters without a bound | note |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    order = list(dict.fromkeys(r["framework"] for r in records))
    for r in sorted(records, key=lambda r: order.index(r["framework"])):
        found = [f"{r['median']:.2f}", f"{r['largest']:.2f}", str(r["unbounded_parameters"])] if "median" in r else None
        cells = [r["framework"], r["how"], r.get("version") or "", *(found or ["crash", "", ""]), r.get("note", "")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure what is installed, and write the table of all that was ever measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", help="only cases whose 'framework, how' contains this text; none without it")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--table", type=Path, help="write the table into this page, between its markers")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    records = {key(r): r for r in map(json.loads, args.out.read_text().splitlines())} if args.out.exists() else {}
    for case in CASES if args.only is not None else ():
        if args.only in f"{case.framework}, {case.how}" and installed(case) is not None:
            record = measure(case, args.steps)
            records[key(record)] = record
            print(json.dumps(record), flush=True)
            ordered = sorted(records.values(), key=lambda r: [key(vars(c)) for c in CASES].index(key(r)))
            args.out.write_text("".join(json.dumps(r) + "\n" for r in ordered), encoding="utf-8")
    if args.table is not None:
        page = args.table.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, marker, after = rest.partition(END)
        if not marker:
            raise ValueError(f"{args.table}: expected the markers {BEGIN} and {END}")
        text = f"{before}{BEGIN}\n\n{table([*from_matrix(), *records.values()])}\n\n{END}{after}"
        args.table.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
