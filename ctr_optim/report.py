"""What a run did, from its event log: a table for the terminal, a picture of the ranks over time."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctr_optim.events import read_events


@dataclass(frozen=True)
class Run:
    """A run's event log, sorted out.

    Attributes:
        history: for each layer its ranks, as ``(step, rank)`` from the first on, one entry a change.
        logs: the entries of the training log.
    """

    history: Mapping[str, Sequence[tuple[int, int]]]
    logs: Sequence[Mapping[str, Any]]

    @property
    def last_step(self) -> int:
        """The last step that left a trace."""
        return max([log["step"] for log in self.logs[-1:]] + [h[-1][0] for h in self.history.values()], default=0)

    def rank(self, layer: str, step: int) -> int:
        """A layer's rank after ``step`` steps."""
        return [rank for at, rank in self.history[layer] if at <= max(step, self.history[layer][0][0])][-1]


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read the event log at ``path``, a directory or the file itself."""
    history: dict[str, list[tuple[int, int]]] = {}
    events = read_events(path)
    for event in events:
        if event["event"] == "start":
            for name, rank in event["ranks"].items():
                if name not in history or history[name][-1][1] != rank:
                    history.setdefault(name, []).append((event["step"], rank))
        elif event["event"] == "rank":
            history[event["name"]].append((event["step"], event["new_rank"]))
    return Run(history, [event for event in events if event["event"] == "log"])


def table(run: Run) -> str:
    """Ranks from first to last and the KL from the base model, layer by layer, and how the trust region fared."""
    last = run.logs[-1] if run.logs else {}
    shares = last.get("kl_from_base/layer", {})
    rows = [
        (name, str(h[0][1]), "->", str(h[-1][1]), str(len(h) - 1), f"{shares[name]:.3g}" if name in shares else "-")
        for name, h in run.history.items()
    ]
    lines = columns(("layer", "first", "", "last", "changes", "KL from base"), rows)
    first, now = ([h[i][1] for h in run.history.values()] for i in (0, -1))
    if first:
        lines += ["", f"mean rank     {sum(first) / len(first):.2f} -> {sum(now) / len(now):.2f}"]
    lines += [f"steps         {run.last_step}"]
    if run.logs:
        scales = [log["trust/scale"] for log in run.logs]
        short = sum(scale < 1 for scale in scales) / len(scales)
        lines += [
            f"KL from base  {last['kl_from_base']:.4g} nats per token",
            f"trust scale   {sum(scales) / len(scales):.3f} on average, least {min(scales):.3f}; "
            f"below 1 in {short:.0%} of {len(scales)} logged steps",
            f"coupling      {last['trust/coupling']:.4g}, {last['trust/source']}",
        ]
        if last["skipped_steps"]:
            lines += [f"skipped       {last['skipped_steps']} steps with gradients that were not finite"]
    return "\n".join(lines)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]


def place(name: str) -> tuple[int, str]:
    """Block and module of a layer: ``model.layers.3.self_attn.q_proj`` is ``(3, "self_attn.q_proj")``."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return (int(found[1]), name[found.end() :] or name) if found else (0, name)


def picture(run: Run, file: str | os.PathLike[str]) -> None:
    """A PNG: one heat map of ranks (block by step) for each module, then KL from base and trust scale by step.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'ctr_optim[plot]'") from error
    modules: dict[str, dict[int, str]] = {}
    for name in run.history:
        block, module = place(name)
        modules.setdefault(module, {})[block] = name
    edges = sorted({step for h in run.history.values() for step, _ in h} | {run.last_step})
    edges = edges if len(edges) > 1 else [edges[0], edges[0] + 1]
    top = max(rank for h in run.history.values() for _, rank in h)
    figure = Figure(figsize=(8, 1.2 * len(modules) + 3), layout="constrained")
    axes = figure.subplots(len(modules) + 1, 1, sharex=True, squeeze=False)[:, 0]
    mesh = None
    for axis, (module, blocks) in zip(axes, modules.items(), strict=False):
        values = [[run.rank(blocks[b], step) for step in edges[:-1]] for b in sorted(blocks)]
        mesh = axis.pcolormesh(edges, range(len(blocks) + 1), values, vmin=0, vmax=top, cmap="viridis")
        axis.set_yticks([i + 0.5 for i in range(len(blocks))], [str(b) for b in sorted(blocks)], fontsize=6)
        axis.set_title(module, fontsize=8, loc="left")
    if mesh is not None:
        figure.colorbar(mesh, ax=list(axes[:-1]), label="rank")
    steps = [log["step"] for log in run.logs]
    axes[-1].plot(steps, [log["kl_from_base"] for log in run.logs], color="C0")
    axes[-1].set_ylabel("KL from base", color="C0")
    scale = axes[-1].twinx()
    scale.plot(steps, [log["trust/scale"] for log in run.logs], color="C1")
    scale.set_ylim(0, 1.05)
    scale.set_ylabel("trust scale", color="C1")
    axes[-1].set_xlabel("step")
    figure.savefig(file, dpi=150)
