"""Test of the bound: the measured KL of every step over its bound, for wrappers, adapters and loss forms.

    python -m benchmarks.trust.matrix --out benchmarks/results/trust-matrix.jsonl --table docs/promises.md

Each cell trains a tiny model for 30 steps at the defaults. Before and after each ``step()`` the program runs the model
on the batch that made the step. It measures the KL over the predictions that enter the loss. DDP and FSDP2 run in two
processes over gloo.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.trust.tiny import ADAPTERS, FORMS
from benchmarks.trust.wrappers import DISTRIBUTED, WRAPPERS, train

BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
STEPS = 30
TIMEOUT = 150  # seconds for all cells in two processes
Cell = tuple[str, str, str]


def cells() -> list[Cell]:
    """Return the cells: wrappers by adapters, and all loss forms without a wrapper and under some wrappers."""
    found = [("none", adapter, form) for adapter in ADAPTERS for form in FORMS]
    for wrapper in WRAPPERS[1:]:
        if wrapper in DISTRIBUTED[:-1]:  # Only the last of the four, the hardest, runs every adapter.
            found += [(wrapper, adapter, "attached") for adapter in ("lora", "bypassed", "whole model")]
        else:
            found += [(wrapper, adapter, "attached") for adapter in ADAPTERS]
        if wrapper in ("Trainer", "Lightning", "Accelerate", DISTRIBUTED[-1], "FSDP2"):
            found += [(wrapper, "lora", form) for form in FORMS[1:]]
    return found


def measure(cell: Cell, steps: int, folder: Path) -> dict[str, Any]:
    """Train one cell and return its result; a crash is a result, too."""
    record: dict[str, Any] = dict(zip(("wrapper", "adapter", "form"), cell, strict=True))
    start = time.perf_counter()
    try:
        losses, meter = train(*cell, steps, folder)
    except Exception as error:
        text = " ".join(str(error).split())
        return {**record, "crash": f"{type(error).__name__}: {text}"[:300]}
    ratios = meter.ratios
    record |= {"steps": len(losses), "source": meter.source, "unbounded_steps": meter.unbounded}
    if ratios:
        record |= {"largest": max(ratios), "median": statistics.median(ratios)}
    record |= {"first_loss": losses[0], "last_loss": statistics.fmean(losses[-5:])}
    return {**record, "seconds": round(time.perf_counter() - start, 2)}


def run(chosen: list[Cell], steps: int) -> list[dict[str, Any]]:
    """Measure cells in this process and print one line of progress per cell."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for cell in chosen:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(measure(cell, steps, Path(folder)))
            if int(os.environ.get("RANK", 0)) == 0:
                print(", ".join(cell), "->", text_of(results[-1]), file=sys.stderr, flush=True)
    return results


def run_in_two_processes(chosen: list[Cell], steps: int) -> list[dict[str, Any]]:
    """Measure cells in two processes over gloo; report cells that a hang or an early end left over."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port, file = free.getsockname()[1], Path(folder) / "cells.jsonl"
        free.close()
        command = [sys.executable, "-m", "benchmarks.trust.matrix", "--worker", str(file), "--steps", str(steps)]
        command += ["--cells", json.dumps(chosen)]
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        workers = [subprocess.Popen(command, env={**env, "RANK": str(rank)}) for rank in range(2)]
        deadline = time.monotonic() + TIMEOUT
        try:
            for worker in workers:
                worker.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        lines = file.read_text().splitlines() if file.exists() else []
    results = [json.loads(line) for line in lines]
    done = {(r["wrapper"], r["adapter"], r["form"]) for r in results}
    for cell in chosen:
        if tuple(cell) not in done:
            names = dict(zip(("wrapper", "adapter", "form"), cell, strict=True))
            results.append({**names, "crash": "not reached: the processes hung or ended earlier"})
    return results


def work(chosen: list[Cell], steps: int, file: Path) -> None:
    """Run as one of two processes."""
    from datetime import timedelta

    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    for cell in chosen:
        [result] = run([cell], steps)
        crashes: list[Any] = [None, None]
        torch.distributed.all_gather_object(crashes, result.get("crash"))
        if any(crashes) and "crash" not in result:
            result["crash"] = f"in the other process: {next(filter(None, crashes))}"
        if torch.distributed.get_rank() == 0:
            with file.open("a") as out:
                out.write(json.dumps(result) + "\n")
    torch.distributed.destroy_process_group()


def text_of(result: dict[str, Any] | None) -> str:
    """Return the text of a table cell."""
    if result is None:
        return ""
    if "crash" in result:
        return f"crash ({result['crash'].partition(':')[0]})"
    if "largest" not in result:
        return "not measured"
    value = f"{result['largest']:.2g}"
    if result["unbounded_steps"]:
        return f"{value} (no bound)"
    return value if result["source"] == "measured" else f"{value} (assumed)"


def tables(results: list[dict[str, Any]]) -> str:
    """Return Markdown: a summary, adapters by loss forms, wrappers by adapters, wrappers by loss forms."""
    by = {(r["wrapper"], r["adapter"], r["form"]): r for r in results}
    largest = [r["largest"] for r in results if "largest" in r]
    medians = [r["median"] for r in results if "median" in r]
    crashes = [r for r in results if "crash" in r]
    unbounded = [r for r in results if r.get("unbounded_steps") or ("crash" not in r and "largest" not in r)]
    lines = [
        f"{len(results)} cells. Median of the largest ratio: {statistics.median(largest):.2f}; "
        f"above 3: {sum(x > 3 for x in largest)}; median of the cells' medians: {statistics.median(medians):.2f}; "
        f"without a bound: {len(unbounded)}; crashes: {len(crashes)}."
        if largest
        else f"{len(results)} cells, {len(crashes)} crashes.",
        "",
    ]

    def table(corner: str, rows: tuple[str, ...], columns: tuple[str, ...], key: Any) -> None:
        lines.append(f"| {corner} | " + " | ".join(columns) + " |")
        lines.append("|" + "---|" * (len(columns) + 1))
        for row in rows:
            found = [text_of(by.get(key(row, column))) for column in columns]
            if any(found):
                lines.append(f"| {row} | " + " | ".join(found) + " |")
        lines.append("")

    table("no wrapper: adapter, loss form", ADAPTERS, FORMS, lambda a, f: ("none", a, f))
    table("wrapper, adapter", WRAPPERS, ADAPTERS, lambda w, a: (w, a, "attached"))
    table("LoRA: wrapper, loss form", WRAPPERS, FORMS, lambda w, f: (w, "lora", f))
    return "\n".join(lines)


def insert(page: Path, table: str) -> None:
    """Replace the text between the markers of a page by ``table``."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"{page}: expected the markers {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Run the matrix, or the cells that match ``--only``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="", help="run cells whose 'wrapper, adapter, form' contains this text")
    parser.add_argument("--out", type=Path, help="write one JSON line per cell to this file")
    parser.add_argument("--table", type=Path, help="write the table into this page, between its markers")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cells", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if args.worker is not None:
        work([tuple(cell) for cell in json.loads(args.cells)], args.steps, args.worker)
        return
    chosen = [cell for cell in cells() if args.only in ", ".join(cell)]
    shared = [cell for cell in chosen if cell[0] in (*DISTRIBUTED, "FSDP2")]
    results = run([cell for cell in chosen if cell not in shared], args.steps)
    if shared:
        results += run_in_two_processes(shared, args.steps)
    if args.out is not None:
        args.out.write_text("".join(json.dumps(r) + "\n" for r in results), encoding="utf-8")
    if args.table is not None:
        insert(args.table, tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
