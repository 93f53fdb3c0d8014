"""Pictures of results of ``python -m benchmarks.real run``.

    python -m benchmarks.real plot lines.jsonl [more.jsonl] --out docs

``real-pareto-TASK.png`` shows task loss against forgetting for every run, one line per method. ``real-KEY-TASK.png``
shows CTROptimizer's default against AdamW's rates, for each varied key (lr, alpha, steps, batch, rank, rows, schedule).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.real import report
from benchmarks.real.report import SETTING, Record, Row
from benchmarks.real.run import read
from benchmarks.real.specs import DEFAULTS

VARIED = ("steps", "batch", "rank", "alpha", "rows", "schedule")


def _figure(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def group_of(row: Row) -> str:
    """Return the name of a row's line in a Pareto picture: a method's rates and weights, or CTROptimizer's options."""
    if row.method != "ctr":
        return row.method
    spec = next(iter(row.runs.values()))["spec"]
    parts = []
    if spec["retain"] is not None:
        parts.append(f"retain {spec['retain']['task'] if isinstance(spec['retain'], dict) else spec['retain']}")
    parts += ["budget"] if spec["kl_budget"] is not None else []
    parts += [key for key in ("trust_penalty", "rank_scheduler") if key in spec["options"]]
    return ", ".join(["CTROptimizer", *parts])


def edge(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point beats in both values, sorted by the first value."""
    best, kept = math.inf, []
    for x, y in sorted(points):
        if y < best:
            best = y
            kept.append((x, y))
    return kept


def pareto(rows: list[Row], base: Record | None, file: Path) -> bool:
    """Draw task loss against forgetting; return False if no run measured forgetting."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        x = row.mean(lambda r: report.rise(r, base))
        y = row.mean(lambda r: r["loss"])
        if math.isfinite(x) and math.isfinite(y):
            points[group_of(row)].append((x, y))
    if not points:
        return False
    figure, axes = _figure("forgetting: rise of the loss on plain text (nats)", "test loss (nats per target token)")
    for index, (name, some) in enumerate(sorted(points.items())):
        ours = name.startswith("CTROptimizer")
        style = {"color": plt.colormaps["tab20"](index % 20), "linewidth": 1.8 if ours else 0.9, "zorder": 4 + ours}
        axes.plot(*zip(*sorted(some), strict=True), marker="o" if ours else ".", label=name, **style)
    outer = edge([point for some in points.values() for point in some])
    axes.plot(*zip(*outer, strict=True), color="black", linewidth=0.7, linestyle=":", label="outer edge", zorder=3)
    lowest = min(y for some in points.values() for _, y in some)
    axes.set_ylim(0.99 * lowest, min(1.25 * lowest, 1.01 * max(y for some in points.values() for _, y in some)))
    axes.set_xscale("symlog", linthresh=0.1)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return True


def rates(rows: list[Row], file: Path) -> bool:
    """Draw test loss over learning rates, one line per method, and CTROptimizer's default as a horizontal line."""
    by_family: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_family[row.family].append(row)
    lines = {name: sorted(some, key=lambda r: r.rate or 0.0) for name, some in by_family.items() if len(some) > 2}
    default = by_family.get("CTROptimizer")
    if not lines or not default:
        return False
    figure, axes = _figure("learning rate", "test loss (nats per target token)")
    axes.set_xscale("log")
    for name, some in lines.items():
        axes.plot([r.rate for r in some], [r.mean(lambda x: x["loss"]) for r in some], ".-", label=name)
    level = default[0].mean(lambda r: r["loss"])
    axes.axhline(level, color="black", linewidth=2, label="CTROptimizer, default")
    axes.set_ylim(0.97 * level, 1.4 * level)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return True


def _setting(setting: tuple) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in zip(SETTING, setting, strict=True)}


def grids(tables: dict[tuple, list[Row]], task: str, key: str, file: Path) -> bool:
    """Draw the loss over one setting, the others at their defaults: CTROptimizer, AdamW tuned and at each rate."""
    lines: dict[str, dict[Any, float]] = defaultdict(dict)
    for setting, rows in tables.items():
        of = _setting(setting)
        free = {key, "alpha"} if key == "rank" else {key}
        if of["task"] != task or of["sequence"] or any(of[k] != DEFAULTS[k] for k in VARIED if k not in free):
            continue
        if key == "rank" and of["alpha"] != 2 * of["rank"]:
            continue
        value = "all" if of[key] is None else of[key]
        for row in rows:
            if row.family == "adamw":
                lines[f"adamw {row.rate:.2g}"][value] = row.mean(lambda r: r["loss"])
        for row in report.tuned(rows):
            if row.family in ("CTROptimizer", "adamw"):
                label = "CTROptimizer, default" if row.method == "ctr" else "adamw, tuned"
                lines[label][value] = row.mean(lambda r: r["loss"])
    values = sorted({v for by_value in lines.values() for v in by_value}, key=lambda v: (isinstance(v, str), v))
    ours = lines.get("CTROptimizer, default", {})
    if len(values) < 2 or not ours:
        return False
    figure, axes = _figure(key, "test loss (nats per target token)")
    for name, by_value in sorted(lines.items()):
        style: dict[str, Any] = {"color": "0.75", "linewidth": 0.8}
        if name == "CTROptimizer, default":
            style = {"color": "black", "linewidth": 2.2}
        elif name == "adamw, tuned":
            style = {"color": "tab:blue", "linewidth": 1.6}
        places = [i for i, v in enumerate(values) if v in by_value]
        axes.plot(places, [by_value[values[i]] for i in places], ".-", label=name, **style)
    axes.set_xticks(range(len(values)), [str(v) for v in values])
    level = [v for v in ours.values() if math.isfinite(v)]
    axes.set_ylim(0.97 * min(level), 1.3 * max(level))
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return True


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lines", nargs="+", help="results files")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    records = read(args.lines)
    base, tables = report.bases(records), report.rows_of(records)
    middle = {k: DEFAULTS[k] for k in VARIED}
    for setting, rows in tables.items():
        of = _setting(setting)
        if of["sequence"] or of["holdout"] or any(of[k] != v for k, v in middle.items()):
            continue
        for name, drawn in (
            (file := args.out / f"real-pareto-{of['task']}.png", pareto(rows, report.base_of(setting, base), file)),
            (file := args.out / f"real-lr-{of['task']}.png", rates(rows, file)),
        ):
            if drawn:
                print(name)
    for task in sorted({_setting(setting)["task"] for setting in tables}):
        for key in VARIED:
            file = args.out / f"real-{key}-{task}.png"
            if grids(tables, task, key, file):
                print(file)
