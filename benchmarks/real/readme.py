"""The picture and the table of the README, from results of ``python -m benchmarks.real run``.

    cd benchmarks/results
    PYTHONPATH=../.. python -m benchmarks.real readme real-default-h200.jsonl real-h200.jsonl \
        retention-peers-h200.jsonl few-rows-h200.jsonl --out ../../docs

Writes ``real-forgetting.png``: test loss against forgetting, for AdamW's grid of rates and for CTROptimizer's default
with and without retained text. Prints the table. AdamW's best rate has the lowest test loss, which favours AdamW. Of
several runs with one specification the first counts.

``kl_schedule="lr"`` sets the same bound as the default where a batch holds 256 loss tokens and no row is seen twice.
Where the default was not run, the table shows runs of ``kl_schedule="lr"`` and marks them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.real.plan_parts import EVERYDAY
from benchmarks.real.report import Record, Row, base_of, bases, rise, rows_of
from benchmarks.real.run import read
from benchmarks.real.specs import DEFAULTS, WIKITEXT, key_of

TASKS = ("e2e", "gsm8k", "hellaswag", "boolq", "arc_easy", "mbpp")
DRAWN = ("e2e", "gsm8k", "hellaswag")
AGAIN = ("arc_easy", "mbpp")  # 200 steps repeat rows, so that kl_schedule="lr" sets another bound than the default
SAME = ("rank", "alpha", "steps", "batch", "schedule", "rows", "sequence", "holdout")
SCHEDULES: tuple[dict[str, Any], ...] = ({}, {"kl_schedule": "auto"}, {"kl_schedule": "lr"})
FILE = "real-forgetting.png"
MARK = "†"


@dataclass
class Task:
    """A task's rows: AdamW by rate, and CTROptimizer's default without and with retained text."""

    name: str
    base: Record | None
    adamw: list[Row]
    default: Row | None
    retained: Row | None

    @property
    def best(self) -> Row | None:
        """AdamW at the rate of lowest test loss, which favours AdamW."""
        return min(self.adamw, key=self.loss) if len(self.adamw) > 1 else None

    @property
    def everyday(self) -> Row | None:
        """AdamW at the common rate ``EVERYDAY``."""
        return next((row for row in self.adamw if row.rate == EVERYDAY), None)

    def loss(self, row: Row) -> float:
        """Return the mean test loss over seeds."""
        return row.mean(lambda record: record["loss"])

    def forgetting(self, row: Row) -> float:
        """Return the mean rise of the WikiText-2 loss over seeds."""
        return row.mean(lambda record: rise(record, self.base))


def first_of_each(records: list[Record]) -> list[Record]:
    """Return the first record of each specification."""
    return list({key_of(record["spec"]): record for record in reversed(records)}.values())


def comparable(records: list[Record]) -> list[Record]:
    """Return the records of each task that were measured on the same test rows.

    A task may have been measured on several numbers of rows. The number counts at which AdamW has the most rates; a
    number with CTROptimizer's default and three rates of AdamW goes before.
    """
    rates: dict[tuple[str, int], set[float]] = {}
    ours: set[tuple[str, int]] = set()
    for spec in (record["spec"] for record in records if record["spec"]["steps"]):
        if all(spec[key] == DEFAULTS[key] for key in SAME) and spec["task"] in TASKS:
            if spec["method"] == "adamw":
                rates.setdefault((spec["task"], spec["evaluate"]), set()).add(spec["lr"])
            elif spec["method"] == "ctr" and spec["lr"] is None and spec["options"] == {}:
                ours.add((spec["task"], spec["evaluate"]))
    best: dict[str, int] = {}
    for task, rows in sorted(rates, key=lambda key: (key in ours and len(rates[key]) > 2, len(rates[key]))):
        best[task] = rows  # the last one stays
    return [r for r in records if r["spec"]["evaluate"] == best.get(r["spec"]["task"], r["spec"]["evaluate"])]


def tasks_of(records: list[Record]) -> dict[str, Task]:
    """Return the tasks with runs in the default setting, by name."""
    records = comparable(records)
    base, found = bases(records), {}
    for setting, rows in rows_of(records).items():
        spec = next(iter(rows[0].runs.values()))["spec"]
        if spec["task"] in TASKS and all(spec[key] == DEFAULTS[key] for key in SAME):
            adamw = sorted((row for row in rows if row.method == "adamw"), key=lambda row: row.rate or 0.0)
            ours = {how: _ours(rows, retain) for how, retain in (("default", (None, "none")), ("text", (WIKITEXT,)))}
            text = None if spec["task"] in AGAIN else ours["text"]
            found[spec["task"]] = Task(spec["task"], base_of(setting, base), adamw, ours["default"], text)
    return {name: found[name] for name in TASKS if name in found}


def _ours(rows: list[Row], retain: tuple[Any, ...]) -> Row | None:
    """Return CTROptimizer's default: the default itself if it was run, else the equal schedule with the most seeds."""
    same = []
    for row in rows:
        spec = next(iter(row.runs.values()))["spec"]
        if spec["method"] == "ctr" and spec["lr"] is None and spec["kl_budget"] is None and spec["retain"] in retain:
            same += [row] if spec["options"] in SCHEDULES else []
    return max(same, key=lambda row: (not _former(row), not _options(row), len(row.runs)), default=None)


def _options(row: Row) -> dict[str, Any]:
    """Return the options that the runs gave to the optimizer."""
    options: dict[str, Any] = next(iter(row.runs.values()))["spec"]["options"]
    return options


def _former(row: Row) -> bool:
    """Return whether the runs use ``kl_schedule="lr"``."""
    return _options(row).get("kl_schedule") == "lr"


def table(tasks: dict[str, Task]) -> list[str]:
    """Return the table in Markdown; the lowest loss of each task is bold."""
    head = ["task", f"AdamW {_short(EVERYDAY)}, not tuned", "AdamW, tuned for the task", "CTROptimizer, not tuned"]
    head += ["with `retain=` WikiText-2, not tuned"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task in tasks.values():
        rows = [task.everyday, task.best, task.default, task.retained]
        lowest = min(f"{task.loss(row):.3f}" for row in rows if row)
        cells = [_cell(task, row, lowest, row is task.best) for row in rows]
        lines.append("| " + " | ".join([task.name, *cells]) + " |")
    return lines


def _cell(task: Task, row: Row | None, lowest: str, rate: bool) -> str:
    if row is None:
        return "not run"
    loss = f"{task.loss(row):.3f}"
    loss = f"**{loss}**" if loss == lowest else loss
    at = f" at {_short(row.rate or 0.0)}" if rate else ""
    seeds = f", {len(row.runs)} seeds" if len(row.runs) > 1 else ""
    mark = MARK if row.method == "ctr" and _former(row) else ""
    return f"{loss} ({task.forgetting(row):+.2f}){at}{seeds}{mark}"


def _short(rate: float) -> str:
    """Format a learning rate in the short form 1.6e-3."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def picture(tasks: dict[str, Task], file: Path) -> None:
    """Draw test loss against forgetting; lower and further left is better."""
    figure, axes = plt.subplots(1, len(DRAWN), figsize=(11, 3.6), layout="constrained")
    for axis, name in zip(axes, DRAWN, strict=True):
        task = tasks[name]
        points = [(task.forgetting(row), task.loss(row)) for row in task.adamw]
        axis.plot(*zip(*points, strict=True), "o-", color="#8a8f98", linewidth=1, markersize=4, label="AdamW, by rate")
        for row, (x, y) in zip(task.adamw, points, strict=True):
            axis.annotate(
                _short(row.rate or 0.0), (x, y), (5, 3), textcoords="offset points", fontsize=7, color="#6a6f77"
            )
        for row, label, marker, color in (
            (task.default, "CTROptimizer, default", "D", "#c2410c"),
            (task.retained, "CTROptimizer, retain=WikiText-2", "*", "#2563eb"),
        ):
            if row is not None:
                size = 12 if marker == "*" else 8
                place = (task.forgetting(row), task.loss(row))
                axis.plot(*place, marker, color=color, markersize=size, markeredgecolor="white", label=label, zorder=5)
        axis.set(title=name, xlabel="rise of the WikiText-2 loss (nats per token)")
        axis.margins(0.14)
        axis.axvline(0, color="#24292f", alpha=0.15, linewidth=0.8, zorder=0)
        axis.grid(alpha=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test loss (nats per target token)")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        "SmolLM2-135M-Instruct, LoRA rank 16, 200 steps of 16: lower and further left is better", fontsize=10
    )
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lines", nargs="+", help="results files")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the picture")
    args = parser.parse_args(arguments)
    tasks = tasks_of(first_of_each(read(args.lines)))
    missing = [name for name in DRAWN if name not in tasks]
    if missing:
        raise SystemExit(f"readme: no runs of {', '.join(missing)} in the default setting")
    args.out.mkdir(parents=True, exist_ok=True)
    picture(tasks, args.out / FILE)
    print("\n".join(table(tasks)))
