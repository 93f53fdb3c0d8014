"""A run as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ctr_optim.report.run import Run


def table(run: Run) -> str:
    """Ranks from first to last and the KL from the base model, layer by layer; then the run as a whole."""
    shares = run.last.get("kl_from_base/layer", {})
    rows = [
        (name, str(h[0][1]), "->", str(h[-1][1]), str(len(h) - 1), f"{shares[name]:.3g}" if name in shares else "-")
        for name, h in run.history.items()
    ]
    lines = columns(("layer", "first", "", "last", "changes", "KL from base"), rows)
    whole = [f"{what:<13} {value}{', ' if more else ''}{more}" for what, value, more in summary(run)]
    return "\n".join([*lines, "", *whole])


def summary(run: Run) -> list[tuple[str, str, str]]:
    """Return the rows that describe the whole run: name, value and remark."""
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
    if run.logs:
        scales = [log["trust/scale"] for log in run.logs]
        short = sum(scale < 1 for scale in scales) / len(scales)
        lines += [
            ("KL from base", f"{run.last['kl_from_base']:.4g} nats per token", "an estimate"),
            (
                "trust scale",
                f"{sum(scales) / len(scales):.3f} on average",
                f"least {min(scales):.3f}; below 1 in {short:.0%} of {_count(len(scales), 'logged step')}",
            ),
            ("coupling", f"{run.last['trust/coupling']:.4g}", run.last["trust/source"]),
        ]
        if run.last["skipped_steps"]:
            lines += [("skipped", _count(run.last["skipped_steps"], "step"), "gradients that were not finite")]
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
