"""Reports as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ctr_optim.report.run import Run
from ctr_optim.report.verdict import verdict

TOP = 10  # number of layers that a report lists by default


def table(run: Run, every: bool = False) -> str:
    """Return a table of layers with their ranks and KL from the base model, the run's summary, and its verdict.

    Args:
        run: the run.
        every: True to list all layers in the model's order; False to list the ten with the most KL.
    """
    shares = run.last.get("kl_from_base/layer") or {}
    names = list(run.history) if every else top(run)
    rows = [
        (name, str(h[0][1]), "->", str(h[-1][1]), str(len(h) - 1), f"{shares[name]:.3g}" if name in shares else "-")
        for name, h in ((name, run.history[name]) for name in names)
    ]
    lines = columns(("layer", "first", "", "last", "changes", "KL from base"), rows) if rows else []
    if len(names) < len(run.history):
        lines += [f"{len(names)} of {len(run.history)} layers, sorted by KL from base; --all lists every layer"]
    whole = [f"{what:<13} {value}{', ' if more else ''}{more}" for what, value, more in summary(run)]
    return "\n".join([*lines, "", *whole, "", verdict(run)])


def top(run: Run) -> list[str]:
    """Return at most :data:`TOP` layers, those with the most KL from base, or the first ones if no KL was logged."""
    shares = run.last.get("kl_from_base/layer") or {}
    return sorted(run.history, key=lambda name: -shares.get(name, 0.0))[:TOP]


def side_by_side(runs: Sequence[Run]) -> str:
    """Return a table of several runs' summaries, with a column for each run, followed by their verdicts."""
    head, rows = compared(runs)
    lines = columns(head, rows)
    return "\n".join([*lines, "", *(f"{run.name}: {verdict(run)}" for run in runs)])


def compared(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table of several runs' summaries; a dash marks a value that a run does not have."""
    found = [{what: value for what, value, _ in summary(run)} for run in runs]
    whats = dict.fromkeys(what for values in found for what in values)
    return ["", *(run.name for run in runs)], [[what, *(values.get(what, "-") for values in found)] for what in whats]


def summary(run: Run) -> list[tuple[str, str, str]]:
    """Return the rows of a run's summary, each as name, value and remark."""
    lines = [("steps", str(run.last_step), "")]
    first, now = list(run.first_ranks.values()), list(run.last_ranks.values())
    if first:
        changes = sum(len(h) - 1 for h in run.history.values())
        lines += [
            ("mean rank", f"{sum(first) / len(first):.2f} -> {sum(now) / len(now):.2f}", _count(changes, "change")),
            ("ranks", f"{min(now)} to {max(now)}", f"in {_count(len(now), 'layer')}"),
        ]
    _, losses = run.series("loss")
    if losses:
        lines += [("loss", f"{losses[0]:.4g} -> {losses[-1]:.4g}", "")]
    for what, key in (("eval loss", run.eval_key), ("hold-out loss", "holdout/loss")):
        best = run.best(key) if key is not None else None
        if key is not None and best is not None:
            values = run.series(key)[1]
            lines += [(what, f"{values[0]:.4g} -> {values[-1]:.4g}", f"best {best[1]:.4g} at step {best[0]}")]
    if run.last.get("budget/limit") is not None:
        lines += [("budget", f"{run.last['budget/used']:.3g} of {run.last['budget/limit']:.3g} nats", "per token")]
    if run.logs:
        scales = [log["trust/scale"] for log in run.logs]
        short = sum(scale < 1 for scale in scales) / len(scales)
        lines += [
            ("KL from base", f"{run.last['kl_from_base']:.4g} nats per token", "an estimate"),
            (
                "trust scale",
                f"{sum(scales) / len(scales):.3f} on average",
                f"minimum {min(scales):.3f}; below 1 in {short:.0%} of {_count(len(scales), 'logged step')}",
            ),
            ("coupling", f"{run.last['trust/coupling']:.4g}", run.last["trust/source"]),
        ]
        if run.last["skipped_steps"]:
            lines += [("skipped", _count(run.last["skipped_steps"], "step"), "gradients were not finite")]
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a text table, with the first column aligned to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
