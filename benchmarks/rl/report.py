"""Markdown tables from results of ``python -m benchmarks.rl run``.

    python -m benchmarks.rl report lines.jsonl [more.jsonl] > tables.md

One table for each setting (passes, training sums, updates). Figures are means over seeds. The step's KL is measured on
the samples that the step was made from, over the tokens that have a gradient; its ratio to the bound shows whether the
bound holds ("steps over the bound": above once, above twice). A factor below 1 made the bound smaller than ``max_kl``.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.rl.run import label, read

Record = dict[str, Any]
LAST = 10  # updates whose rewards are averaged
LEAST = 1e-5  # nats per token; a smaller KL, at the end of a schedule, is near float32's rounding
FACTORS = ("few_tokens", "seen_rows", "constant_rate", "budget", "holdout")  # the schedule's factor is always there


def setting_of(record: Record) -> tuple[int, int | None, int]:
    spec = record["spec"]
    return spec["passes"], spec["rows"], spec["updates"]


def name_of(setting: tuple[int, int | None, int]) -> str:
    passes, rows, updates = setting
    steps = "one step" if passes == 1 else f"{passes} steps"
    return f"{updates} updates, {steps} for each batch of samples, {rows or 'all'} training sums"


def mean(values: Iterable[float | None], digits: int = 3) -> str:
    """Mean, and the standard deviation of two values and more."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{spread}"


def ratios(record: Record) -> list[float]:
    """Measured KL over the bound, of every measured step with a gradient and a bound that rounding does not hide."""
    return [m["kl"] / m["bound"] for m in record["measured"] if (m.get("bound") or 0) > LEAST and m["tokens"]]


def over(records: list[Record]) -> str:
    """Share of the measured steps whose KL is above the bound, and above twice the bound."""
    found = [v for r in records for v in ratios(r)]
    return "" if not found else " / ".join(f"{sum(v > most for v in found) / len(found):.0%}" for most in (1, 2))


def factors(records: list[Record]) -> str:
    """Factors of the bound below 1, as medians over the measured steps."""
    parts = []
    for name in FACTORS:
        seen = [m[name] for r in records for m in r["measured"] if name in m]
        if seen and min(seen) < 0.995:
            parts.append(f"{name} {statistics.median(seen):.2g} (least {min(seen):.2g})")
    return ", ".join(parts)


def table(records: list[Record]) -> list[str]:
    """The lines of one setting's table."""
    by_method: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_method[label(record["spec"])].append(record)
    columns: dict[str, Callable[[list[Record]], str]] = {
        "seeds": lambda rs: str(len(rs)),
        "accuracy before": lambda rs: mean(r["curve"][0][1] for r in rs),
        "after": lambda rs: mean(r["accuracy"] for r in rs),
        "reward, last 10": lambda rs: mean(statistics.fmean(r["rewards"][-LAST:]) for r in rs),
        "groups that disagree": lambda rs: mean((statistics.fmean(r["taught"]) for r in rs), 2),
        "KL from base": lambda rs: mean(r["kl_from_base"] for r in rs),
        "WikiText-2": lambda rs: mean(
            None if r["text"] is None or r["text_before"] is None else r["text"] - r["text_before"] for r in rs
        ),
        "median KL of a step": lambda rs: mean((statistics.median(m["kl"] for m in r["measured"]) for r in rs), 4),
        "KL over bound, median": lambda rs: mean((statistics.median(x) if (x := ratios(r)) else None for r in rs), 2),
        "worst": lambda rs: f"{max(x):.2f}" if (x := [v for r in rs for v in ratios(r)]) else "",
        "steps over the bound": over,
        "s an update": lambda rs: mean((r["seconds_per_update"] for r in rs), 2),
        "factors of the bound": factors,
    }
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, runs in sorted(by_method.items(), key=lambda item: -statistics.fmean(r["accuracy"] for r in item[1])):
        lines.append(f"| {method} | " + " | ".join(make(runs) for make in columns.values()) + " |")
    return lines


def curves(records: list[Record]) -> list[str]:
    """Held-out accuracy after 0, 25, 50, ... updates, means over seeds."""
    by_method: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_method[label(record["spec"])].append(record)
    steps = [step for step, _ in records[0]["curve"]]
    lines = ["| accuracy after | " + " | ".join(map(str, steps)) + " |", "|---" * (len(steps) + 1) + "|"]
    for method, runs in sorted(by_method.items()):
        found = [dict(map(tuple, r["curve"])) for r in runs]
        lines.append(f"| {method} | " + " | ".join(mean((f.get(s) for f in found), 3) for s in steps) + " |")
    return lines


def report(records: list[Record]) -> str:
    """All tables, and the runs that failed."""
    good = [r for r in records if "error" not in r]
    by_setting: dict[tuple, list[Record]] = defaultdict(list)
    for record in good:
        by_setting[setting_of(record)].append(record)
    lines = []
    for setting in sorted(by_setting, key=str):
        runs = by_setting[setting]
        lines += [f"### {name_of(setting)}", "", *table(runs), "", *curves(runs), ""]
    lines += [f"- failed: {label(r['spec'])}, seed {r['spec']['seed']}: {r['error']}" for r in records if "error" in r]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lines", nargs="+", help="results files")
    print(report(read(parser.parse_args(arguments).lines)))
