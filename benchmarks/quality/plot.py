"""Plots of result lines: loss over learning rates, against parameters, and against time.

    python -m benchmarks.quality.plot benchmarks/results/quality-*.jsonl --out docs

Writes ``robustness.png``, ``pareto.png`` and ``wallclock.png``, each only if the lines hold its runs.
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
    """Return a line style: black and bold for CTROptimizer, thin and coloured for other methods."""
    strong = {"color": "black", "linewidth": 2.2, "zorder": 5}
    plain = {"color": plt.colormaps["tab10"](index % 10), "linewidth": 1.2, "zorder": 4}
    return {"label": NAMES.get(method, method), **(strong if method == "ctr" else plain)}


def robustness(records: list[dict[str, Any]], out: Path) -> None:
    """Draw every method's loss over a 64-fold range of rates; CTROptimizer, AdamW and the best peers have labels."""
    losses = report.robustness(records)
    if not losses:
        return
    lowest = {method: min(by_rate.values()) for method, by_rate in losses.items()}
    best = min(lowest.values())
    named = ["ctr", *sorted(lowest.keys() & set(plans.Lines(records).best_three()), key=lowest.__getitem__)]
    figure, axes = _axes("learning rate, over the middle of the method's range", "validation loss (nats per token)")
    for method, by_rate in losses.items():
        wide = plans.wide_grid(method)
        rates = [r for r in wide if r in by_rate]
        style = {"color": "0.82", "linewidth": 0.9, "zorder": 1}
        if method in named:
            style = _style(method, named.index(method) - 1)
        axes.plot([r / wide[3] for r in rates], [by_rate[r] for r in rates], ".-", **style)
    axes.plot([], [], color="0.82", label=f"{len(losses) - len(named)} other peers")
    axes.set(ylim=(0.98 * best, 1.4 * best))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    handles = {handle.get_label(): handle for handle in axes.lines if not handle.get_label().startswith("_")}
    order = [*(NAMES.get(m, m) for m in named if m in losses), f"{len(losses) - len(named)} other peers"]
    axes.legend([handles[name] for name in order], order, frameon=True, framealpha=0.9, edgecolor="none", fontsize=9,
                loc="upper right")  # fmt: skip
    figure.savefig(out / "robustness.png", dpi=130)


def pareto(records: list[dict[str, Any]], out: Path) -> None:
    """Draw test loss against trainable parameters, ranks 1 to 16."""
    lines = plans.Lines(records)
    points: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in report.select(records, plans.pareto(lines)):
        spec = record["spec"]
        method = "CTROptimizer, ranks move" if "rank_scheduler" in spec["options"] else spec["method"]
        points[method][spec["rank"]].append(record)
    if not points:
        return
    figure, axes = _axes("trainable parameters", "test loss (nats per token)")
    ticks = {}
    for index, (method, by_rank) in enumerate(sorted(points.items())):
        runs = [by_rank[rank] for rank in sorted(by_rank)]
        x = [statistics.mean(r["parameters"] for r in some) for some in runs]
        y = [statistics.mean(r["loss"] for r in some) for some in runs]
        moving = {"marker": "x", "linestyle": "none", "color": "tab:green", "zorder": 6} if "move" in method else {}
        axes.plot(x, y, **{"marker": "o", **_style(method, index), **moving})
        if method == "ctr":
            ticks = {count: f"{count / 1e6:.2f}M\nrank {rank}" for count, rank in zip(x, sorted(by_rank), strict=True)}
    if ticks:
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(out / "pareto.png", dpi=130)


def wallclock(records: list[dict[str, Any]], out: Path) -> None:
    """Draw test loss after 150 steps against time per step, measured alone on the device."""
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
