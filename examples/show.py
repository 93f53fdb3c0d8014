"""Pictures and tables of ``finetune.py``."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from common import Row
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

console = Console(width=None if Console().is_terminal else 110, highlight=False)
COLORS = {"AdamW": "#8a8f98", "CTR": "#c2410c"}


@dataclass
class Run:
    """Results of one optimizer at one rate; losses in nats per token."""

    name: str
    lr: float
    train_loss: list[float] = field(default_factory=list)
    test_loss: dict[int, float] = field(default_factory=dict)
    text_loss: float = float("nan")
    step_seconds: list[float] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Optimizer and rate."""
        return f"{self.name} {self.lr:g}"

    @property
    def last(self) -> float:
        """Test loss at the end."""
        return self.test_loss[max(self.test_loss)]


def tell(progress: Progress, bar: Any, runs: list[Run], step: int) -> None:
    """Update the progress bar; without a terminal, print a line every 20 steps."""
    losses = {name: [run.train_loss[-1] for run in runs if run.name == name] for name in COLORS}
    note = "  ".join(f"{name} {' '.join(f'{loss:.2f}' for loss in some)}" for name, some in losses.items())
    progress.update(bar, note=f"loss: {note}")
    if not console.is_terminal and step % 20 == 0:
        console.print(f"step {step:4}  training loss by rate: {note}")


def progress_bar() -> Progress:
    """Return progress bars for training and evaluation, disabled without a terminal."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[note]}"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip


def smooth(values: list[float], window: int) -> list[float]:
    """Return running means over the last ``window`` values, over fewer at the start."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def plot(runs: list[Run], before: Run, title: str, path: Path) -> None:
    """Draw training loss over steps (left) and test loss against forgetting, one point per rate (right)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    lowest = min(run.last for run in runs)
    shown = [run for run in runs if run.last < 1.6 * lowest]  # A diverged run would compress the scale of the others.
    for name, color in COLORS.items():
        for index, run in enumerate(run for run in runs if run.name == name):
            style = {"color": color, "linestyle": ["--", "-", ":"][index % 3]}
            left.plot(range(1, len(run.train_loss) + 1), smooth(run.train_loss, 10), label=run.label, **style)
        points: dict[tuple[float, float], list[str]] = {}  # Rates that end at the same point share a label.
        for run in sorted((run for run in shown if run.name == name), key=lambda run: run.lr):
            place = (round(run.text_loss - before.text_loss, 2), round(run.last, 2))
            points.setdefault(place, []).append(f"{run.lr:g}")
        right.plot(*zip(*points, strict=True), "o-", color=color, linewidth=0.8, markersize=8, label=name)
        for place, rates in points.items():
            right.annotate(", ".join(rates), place, (7, 5), textcoords="offset points", fontsize=8, color=color)
    outside = [run.label for run in runs if run not in shown]
    if outside:
        right.text(0.98, 0.02, f"outside: {', '.join(outside)}", transform=right.transAxes, ha="right", fontsize=8)
    left.set_ylim(0.85 * lowest, min(before.test_loss[0], 3 * lowest))
    left.set(xlabel="step", ylabel="training loss (nats per target token)", title="training")
    right.set(
        xlabel="forgetting: rise of the loss on plain text (nats per token)",
        ylabel="test loss (nats per target token)", title="lower and further left is better",
    )  # fmt: skip
    right.margins(0.2)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def losses_table(runs: list[Run], before: Run, title: str) -> Table:
    """Return the table of losses, one row per run."""
    table = Table(title=f"{title}: loss per target token on the test rows (nats)", title_justify="left")
    steps = sorted(runs[0].test_loss)
    for column in (
        "optimizer",
        "lr",
        "before",
        *(f"step {step}" for step in steps),
        "forgetting",
        "ms per step (median)",
    ):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for run in runs:
        cells = [f"{loss:.3f}" for loss in (before.test_loss[0], *(run.test_loss[step] for step in steps))]
        rise, seconds = run.text_loss - before.text_loss, statistics.median(run.step_seconds)
        table.add_row(run.name, f"{run.lr:g}", *cells, f"{rise:+.3f}", f"{1000 * seconds:.0f}")
    return table


def samples_table(prompts: list[Row], before: Run, runs: list[Run]) -> Table:
    """Return the table of generations before and after training."""
    table = Table(title="Generations on test prompts (greedy)", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for i, row in enumerate(prompts):
        table.add_row("[bold]prompt", f"[bold]{escape(row['prompt'].strip())}")
        table.add_row("reference", escape(row["target"]))
        table.add_row("before", escape(before.samples[i]), style="dim")
        for run in runs:
            table.add_row(run.label, escape(run.samples[i]))
        table.add_section()
    return table


def summary(runs: list[Run], default: Run, note: str) -> Iterator[str]:
    """Yield sentences about the effect of the rates, the cost of a step, and the bound."""
    for name in COLORS:
        ends = [run.last for run in runs if run.name == name]
        yield f"{name} over its rates: test loss {min(ends):.3f} to {max(ends):.3f} nats."
    cost = {name: statistics.median(s for r in runs if r.name == name for s in r.step_seconds) for name in COLORS}
    yield f"A step of CTR takes {cost['CTR'] / cost['AdamW']:.2f} times as long as a step of AdamW (median)."
    last, limited = default.metrics[-1], [m for m in default.metrics if m["trust/scale"] < 1]
    yield (
        f"Trust region at lr {default.lr:g}: the bound shortened {len(limited)} of {len(default.metrics)} logged "
        f"steps; coupling {last['trust/coupling']:.0f} ({last['trust/source']}); KL from base at the end "
        f"{last['kl_from_base']:.3f} nats per token (estimated)."
    )
    if note:
        yield note
