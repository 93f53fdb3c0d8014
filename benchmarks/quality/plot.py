"""Plots from raw lines: robustness over learning rates, loss against parameters, loss against time.

    python -m benchmarks.quality.plot benchmarks/results/quality-*.jsonl --out docs

Writes ``robustness.png``, ``pareto.png`` and ``wallclock.png``, each if there are runs for it.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.quality import plans, report

NAMES = {"ctr": "CTROptimizer", "adamw": "AdamW"}


def _axes(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(method: str, index: int) -> dict[str, Any]:
    """Ours black and bold, the rest thin and in colours."""
    strong = {"color": "black", "linewidth": 2.2, "zorder": 5}
    plain = {"color": plt.colormaps["tab20"](index % 20), "linewidth": 1.0}
    return {"label": NAMES.get(method, method), **(strong if method == "ctr" else plain)}


def robustness(records: list[dict[str, Any]], out: Path) -> None:
    """Every method's loss over a factor of 64 around the middle of its grid."""
    losses = report.robustness(records)
    if not losses:
        return
    figure, axes = _axes("learning rate, over the middle of the method's range", "validation loss (nats per token)")
    for index, (method, by_rate) in enumerate(sorted(losses.items())):
        wide = plans.wide_grid(method)
        rates, middle = [r for r in wide if r in by_rate], wide[3]
        axes.plot([r / middle for r in rates], [by_rate[r] for r in rates], ".-", **_style(method, index))
    best = min(v for by_rate in losses.values() for v in by_rate.values())
    axes.set(ylim=(0.98 * best, 1.5 * best))
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False, fontsize=7, ncols=3)
    figure.savefig(out / "robustness.png", dpi=130)


def pareto(records: list[dict[str, Any]], out: Path) -> None:
    """Test loss against trainable parameters, ranks 1 to 16."""
    lines = plans.Lines(records)
    points: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in report.select(records, plans.pareto(lines)):
        spec = record["spec"]
        method = spec["method"] + (" (ranks move)" if "rank_scheduler" in spec["options"] else "")
        points[method][spec["rank"]].append(record)
    if not points:
        return
    figure, axes = _axes("trainable parameters", "test loss (nats per token)")
    for index, (method, by_rank) in enumerate(sorted(points.items())):
        runs = [by_rank[rank] for rank in sorted(by_rank)]
        x = [statistics.mean(r["parameters"] for r in some) for some in runs]
        y = [statistics.mean(r["loss"] for r in some) for some in runs]
        axes.plot(x, y, "o-", **_style(method, index))
    axes.legend(frameon=False)
    figure.savefig(out / "pareto.png", dpi=130)


def wallclock(records: list[dict[str, Any]], out: Path) -> None:
    """Every peer's test loss after 150 steps against the time that they take, measured alone on the device."""
    lines = plans.Lines(records)
    step = {r["spec"]["method"]: r["seconds"] / r["spec"]["steps"] for r in report.select(records, plans.timing(lines))}
    losses: dict[str, list[float]] = defaultdict(list)
    for record in report.select(records, plans.peers(lines)):
        losses[record["spec"]["method"]].append(record["loss"])
    shown = {m: statistics.mean(v) for m, v in losses.items() if m in step and all(map(math.isfinite, v))}
    if not shown:
        return
    figure, axes = _axes("milliseconds a step", "test loss after 150 steps (nats per token)")
    for method, loss in shown.items():
        axes.plot(1000 * step[method], loss, "o", color="black" if method == "ctr" else "tab:blue")
        axes.annotate(NAMES.get(method, method), (1000 * step[method], loss), fontsize=8, xytext=(4, 3),
                      textcoords="offset points")  # fmt: skip
    figure.savefig(out / "wallclock.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+", help="results files")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures")
    args = parser.parse_args()
    records = plans.read(args.lines)
    for picture in (robustness, pareto, wallclock):
        picture(records, args.out)


if __name__ == "__main__":
    main()
