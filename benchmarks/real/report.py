"""Markdown tables of results of ``python -m benchmarks.real run``.

    python -m benchmarks.real report lines.jsonl [more.jsonl] > tables.md

Each setting (task, rank, steps, batch, schedule, rows) has one table. A method's learning rate is the rate of lowest
mean validation loss among the runs, never of lowest test loss. The best tuned peer has the lowest validation loss.
Forgetting is the rise of the loss on plain text over that of the untrained base model. Differences are paired by seed,
with 95 % intervals (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.report import interval
from benchmarks.real.plan_parts import EVERYDAY
from benchmarks.real.run import read
from benchmarks.real.specs import DEFAULTS, Spec, complete

Record = dict[str, Any]
Runs = dict[int, Record]  # by seed

SETTING = ("task", "sequence", "rank", "alpha", "steps", "batch", "schedule", "rows", "holdout", "max_length")


def family_of(spec: Spec) -> str:
    """Return a method's name with its options and without its rate."""
    options = [f"{k}={json.dumps(v)}" for k, v in spec["options"].items()]
    if spec["retain"] is not None:
        retain = spec["retain"]
        options.append(f"retain={retain['task'] if isinstance(retain, dict) else retain}")
    if spec["kl_budget"] is not None:
        options.append(f"kl_budget={spec['kl_budget']:g}")
    name = "CTROptimizer" if spec["method"] == "ctr" else spec["method"]
    return name + (f" ({', '.join(options)})" if options else "")


def setting_of(spec: Spec) -> tuple:
    """Return the values that the runs of one table share."""
    return tuple(json.dumps(spec[key]) for key in SETTING)


def name_of(setting: tuple) -> str:
    """Return a table's heading."""
    of = {key: json.loads(value) for key, value in zip(SETTING, setting, strict=True)}
    parts = [" then ".join(of["sequence"]) if of["sequence"] else of["task"], f"{of['steps']} steps of {of['batch']}"]
    parts.append(of["schedule"])
    parts.append("all rows" if of["rows"] is None else f"{of['rows']} rows")
    if of["holdout"]:
        parts.append(f"{of['holdout']} rows held out as judges")
    for key in ("rank", "alpha"):
        if of[key] != DEFAULTS[key]:
            parts.append(f"{key} {of[key]}")
    return ", ".join(parts)


@dataclass
class Row:
    """A method at one rate: its runs by seed."""

    family: str
    method: str
    rate: float | None
    runs: Runs

    @property
    def label(self) -> str:
        return self.family + ("" if self.rate is None else f" {self.rate:.2g}")

    def mean(self, value: Callable[[Record], float | None]) -> float:
        """Return the mean over seeds: infinite if a run diverged, NaN if no run has the value."""
        known = [v for v in map(value, self.runs.values()) if v is not None]
        if not known:
            return math.nan
        return statistics.mean(known) if all(map(math.isfinite, known)) else math.inf


def rows_of(records: Iterable[Record]) -> dict[tuple, list[Row]]:
    """Return the rows by setting, without failed runs and runs of zero steps."""
    tables: dict[tuple, dict[tuple, Row]] = defaultdict(dict)
    for record in records:
        spec = record["spec"]
        if "loss" not in record or not spec["steps"]:
            continue
        key = (family_of(spec), spec["lr"])
        row = tables[setting_of(spec)].setdefault(key, Row(key[0], spec["method"], spec["lr"], {}))
        row.runs[spec["seed"]] = record
    return {setting: list(rows.values()) for setting, rows in tables.items()}


def bases(records: Iterable[Record]) -> dict[str, Record]:
    """Return the untrained base model's record by task."""
    return {r["spec"]["task"]: r for r in records if r["spec"]["steps"] == 0 and "loss" in r}


def base_of(setting: tuple, base: dict[str, Record]) -> Record | None:
    """Return the base model's record for a table, or another task's record, which has the same text and domains."""
    return base.get(json.loads(setting[0])) or next(iter(base.values()), None)


def chosen_by(row: Row) -> float:
    """Return the loss that rates are chosen by: mean validation loss, or test loss if no rows were held out."""
    loss = row.mean(lambda r: r.get("validation"))
    loss = row.mean(lambda r: r["loss"]) if math.isnan(loss) else loss
    return loss if math.isfinite(loss) else math.inf


def tuned(rows: Iterable[Row]) -> list[Row]:
    """Return every family at its best rate among the rates with the most seeds."""
    by_family: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_family[row.family].append(row)
    best = []
    for some in by_family.values():
        most = max(len(row.runs) for row in some)
        best.append(min((row for row in some if len(row.runs) == most), key=chosen_by))
    return best


def best_peer(rows: Iterable[Row]) -> Row | None:
    """Return the tuned method of lowest validation loss other than CTROptimizer."""
    return min((row for row in rows if row.method != "ctr"), key=chosen_by, default=None)


def rise(record: Record, base: Record | None) -> float | None:
    """Return the forgetting: loss on plain text minus that of the base model, in nats."""
    if base is None or record.get("text") is None or record["spec"]["text"] != base["spec"]["text"]:
        return None
    return record["text"] - base["text"]


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return ""
    return "diverged" if math.isinf(value) else f"{value:{'+' if sign else ''}.{digits}f}"


def difference(row: Row, reference: Row | None) -> str:
    """Return the mean paired difference of test losses, with its interval if there are two or more seeds."""
    if reference is None or reference is row:
        return ""
    pairs = [row.runs[s]["loss"] - reference.runs[s]["loss"] for s in row.runs if s in reference.runs]
    if not pairs or not all(map(math.isfinite, pairs)):
        return ""
    if len(pairs) == 1:
        return f"{pairs[0]:+.4f}"
    mean, half = interval(pairs)
    return f"{mean:+.4f} ± {half:.4f}"


def table(rows: list[Row], base: Record | None, reference: Row | None) -> list[str]:
    """Return the rows as Markdown, lowest test loss first."""
    every = [r for row in rows for r in row.runs.values()]
    domains = sorted({task for r in every for task in r.get("domains", {})})
    scores = sorted({name for r in every for name in r.get("score", {})})
    head = ["method", "loss", "sd", "n", "from the best tuned peer", "validation", "forgetting"]
    head += [f"{task} rises" for task in domains]
    head += [name.replace("_", " ") + (" %" if _percent(name) else "") for name in scores]
    head += ["seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]

    def domain(record: Record, task: str) -> float | None:
        known = record.get("domains", {}).get(task)
        return None if base is None or known is None else known - base.get("domains", {}).get(task, math.nan)

    for row in sorted(rows, key=lambda row: _last(row.mean(lambda r: r["loss"]))):
        losses = [r["loss"] for r in row.runs.values()]
        cells = [
            row.label,
            number(row.mean(lambda r: r["loss"]), 4),
            f"{statistics.stdev(losses):.4f}" if len(losses) > 1 and all(map(math.isfinite, losses)) else "",
            str(len(losses)),
            difference(row, reference),
            number(row.mean(lambda r: r.get("validation")), 4),
            number(row.mean(lambda r: rise(r, base)), 3, sign=True),
            *(number(row.mean(lambda r, t=task: domain(r, t)), 3, sign=True) for task in domains),
            *(_score(row, name) for name in scores),
            number(row.mean(lambda r: r["seconds"]), 0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _last(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _percent(name: str) -> bool:
    return name.startswith(("accuracy", "exact_match"))


def _score(row: Row, name: str) -> str:
    value = row.mean(lambda r: r.get("score", {}).get(name))
    return number(100 * value, 1) if _percent(name) else number(value)


def rates_table(rows: list[Row], base: Record | None) -> list[str]:
    """Return a table of test loss and forgetting by rate, for families with several rates."""
    by_family: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.rate is not None:
            by_family[row.family].append(row)
    lines = ["| method | rate: test loss (forgetting) |", "|---|---|"]
    for name, some in by_family.items():
        if len(some) > 1:
            cells = [
                f"{row.rate:.2g}: {number(row.mean(lambda r: r['loss']))} "
                f"({number(row.mean(lambda r: rise(r, base)), 2, sign=True)})"
                for row in sorted(some, key=lambda row: row.rate or 0.0)
            ]
            lines.append(f"| {name} | {'; '.join(cells)} |")
    return lines if len(lines) > 2 else []


def summary(tables: dict[tuple, list[Row]], base: dict[str, Record]) -> list[str]:
    """Return one line per setting: CTROptimizer's default and best fixed bound, AdamW tuned and at the common rate."""
    head = ["setting", "default", "best of ours", "AdamW tuned", f"AdamW {EVERYDAY:g}", "best peer",
            "default from AdamW tuned", "forgetting: default, AdamW tuned"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    changes = []
    for setting, rows in sorted(tables.items()):
        best = tuned(rows)
        ours = [row for row in best if row.method == "ctr"]
        default = next((row for row in ours if row.family == "CTROptimizer"), None)
        strongest = min(ours, key=chosen_by, default=None)
        adamw = next((row for row in best if row.family == "adamw"), None)
        usual = next((r for r in rows if r.family == "adamw" and r.rate and math.isclose(r.rate, EVERYDAY)), None)
        peer = best_peer(best)
        own = base_of(setting, base)
        share = _relative(default, adamw)
        changes += [share] if share is not None else []

        forgetting = [number(x.mean(lambda r, o=own: rise(r, o)), 2, sign=True) if x else "" for x in (default, adamw)]
        cells = [
            name_of(setting),
            _loss(default),
            _loss(strongest, True),
            _loss(adamw),
            _loss(usual),
            _loss(peer, True),
        ]
        cells += ["" if share is None else f"{100 * share:+.1f} %", ", ".join(forgetting)]
        lines.append("| " + " | ".join(cells) + " |")
    if changes:
        lines += ["", f"Mean over {len(changes)} settings: {100 * statistics.mean(changes):+.2f} % from AdamW tuned."]
    return lines


def _loss(row: Row | None, name: bool = False) -> str:
    if row is None:
        return ""
    return number(row.mean(lambda r: r["loss"])) + (f" ({row.label})" if name else "")


def _relative(row: Row | None, reference: Row | None) -> float | None:
    if row is None or reference is None:
        return None
    ours, theirs = row.mean(lambda r: r["loss"]), reference.mean(lambda r: r["loss"])
    return ours / theirs - 1 if math.isfinite(ours) and math.isfinite(theirs) else None


def sequences(rows: list[Row]) -> list[str]:
    """Return a table of the loss of every task of a sequence after each task."""
    lines = []
    for row in tuned(rows):
        phases = [r["sequence"] for r in row.runs.values() if r.get("sequence")]
        if phases and not lines:
            tasks = [p["task"] for p in phases[0]]
            lines = ["| method | after | " + " | ".join(f"{t} loss" for t in tasks) + " | text |"]
            lines.append("|" + "---|" * (len(tasks) + 3))
        for index in range(len(phases[0]) if phases else 0):
            some = [p[index] for p in phases]
            cells = [number(statistics.mean(p["losses"][t] for p in some)) for t in some[0]["losses"]]
            text = [p["text"] for p in some if p["text"] is not None]
            cells.append(number(statistics.mean(text)) if text else "")
            lines.append(f"| {row.label} | {some[0]['task']} | {' | '.join(cells)} |")
    return lines


def failures(records: Iterable[Record]) -> list[str]:
    """Return the failed runs, one line per method and error."""
    seen = sorted({(family_of(r["spec"]), r["error"]) for r in records if "error" in r})
    return [f"- {name}: {error}" for name, error in seen]


def report(records: list[Record]) -> str:
    """Return all tables."""
    base, tables = bases(records), rows_of(records)
    out = [
        "# The real model: every table",
        "",
        "Written by `python -m benchmarks.real report`. Losses in nats per target token.",
        "",
    ]
    out += ["## In short", "", *summary(tables, base)]
    for setting, rows in sorted(tables.items()):
        own, best = base_of(setting, base), tuned(rows)
        out += ["", f"## {name_of(setting)}", ""]
        if own is not None and own["spec"]["task"] == json.loads(setting[0]):
            out += [f"The untrained base: loss {own['loss']:.3f}, text {own.get('text') or math.nan:.3f}.", ""]
        out += table(best, own, best_peer(best))
        for more in (sequences(rows), rates_table(rows, own)):
            out += ["", *more] if more else []
    failed = failures(records)
    return "\n".join([*out, *(["", "## Failed runs", "", *failed] if failed else []), ""])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lines", nargs="+", help="results files")
    args = parser.parse_args(arguments)
    records = [{**r, "spec": complete(r["spec"])} for r in read(args.lines)]
    print(report(records), end="")
