"""Tables from a results file.

    python -m benchmarks.quality.report benchmarks/results/quality-h200.jsonl

Mean and standard deviation over seeds, and the mean paired difference from ``--against`` with its 95 % interval (t).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from typing import Any

_T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def label(spec: dict[str, Any]) -> str:
    """A method with what sets it apart."""
    options = ", ".join(f"{k}={v}" for k, v in spec["options"].items())
    rate = "" if spec["lr"] is None else f" lr {spec['lr']:g}"
    return f"{spec['method']}{rate}{' ' + options if options else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results")
    parser.add_argument("--phase", default="final")
    parser.add_argument("--against", default="ctr", help="label of the row that differences are taken from")
    args = parser.parse_args()
    tables: dict[tuple, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    with open(args.results) as lines:
        for record in map(json.loads, lines):
            spec = record["spec"]
            if record["phase"] == args.phase and "loss" in record:
                key = (spec["base"], spec["task"], spec["steps"], spec["batch"], spec["rank"])
                tables[key][label(spec)][spec["seed"]] = record["loss"]
    for key, rows in sorted(tables.items()):
        base, task, steps, batch, rank = key
        print(f"\n### {base}, {task}, {steps} steps of {batch}, rank {rank}\n")
        print(f"| method | loss | sd | seeds | difference from `{args.against}` |\n|---|---|---|---|---|")
        reference = rows.get(args.against, {})
        for name, losses in sorted(rows.items(), key=lambda row: statistics.mean(row[1].values())):
            values = list(losses.values())
            sd = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
            pairs = [losses[s] - reference[s] for s in losses if s in reference]
            print(f"| {name} | {statistics.mean(values):.4f} | {sd} | {len(values)} | {interval(pairs)} |")


def interval(differences: list[float]) -> str:
    """Mean and 95 % interval of paired differences."""
    n = len(differences)
    if n < 2 or not any(differences):
        return "-"
    half = _T95.get(n - 1, 1.96) * statistics.stdev(differences) / math.sqrt(n)
    return f"{statistics.mean(differences):+.4f} ± {half:.4f}"


if __name__ == "__main__":
    main()
