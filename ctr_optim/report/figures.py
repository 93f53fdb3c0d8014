"""The figures of a report, in matplotlib; image files and the HTML page (as SVG) use the same figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ctr_optim.report.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The HTML page replaces these colours by those of its light or dark scheme.
INK, PAPER, ACCENT, SECOND = "#24292f", "#fefefe", "#c2410c", "#2563eb"
_LESS, _SAME, _MORE = "#2f6db5", "#d6d5d0", "#c2410c"  # ranks below, at and above the mean rank at the start
_RAMP = ["#f3ece2", "#e9b384", "#c2410c", "#5b1a05"]  # shares, from 0 to the largest
_STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.edgecolor": INK, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.6,
    "legend.frameon": False, "legend.fontsize": 8, "figure.facecolor": "white",
    "svg.fonttype": "none", "svg.hashsalt": "ctr_optim",
}  # fmt: skip

Draw = Callable[[Any], None]
Part = tuple[str, Draw, float]  # name, drawing function, and height in inches at a width of 12 inches


def curves(canvas: Any, runs: Sequence[Run]) -> None:
    """Draw the losses, the KL from the base model, each step's predicted KL with its bound, and the trust scale."""
    panels: list[tuple[str, Callable[[Axes], None]]] = []
    several = len(runs) > 1
    colors = [ACCENT, SECOND][: len(runs)]

    def losses(axis: Axes) -> None:
        for run, color in zip(runs, colors, strict=True):
            for index, (what, key, other, style) in enumerate(_losses(run)):
                steps, values = run.series(key)
                shade = color if several or what == "training" else other
                name = (
                    what if not several else run.name if index == 0 else f"_{what}"
                )  # matplotlib's legend omits labels with "_"
                _line(axis, steps, values, shade, name, style)
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(loc="best")

    def base(axis: Axes) -> None:
        for run, color in zip(runs, colors, strict=True):
            _line(axis, *run.series("kl_from_base"), color, run.name)
            for limit in run.series("budget/limit")[1][-1:]:
                axis.axhline(limit, color=color, alpha=0.5, linestyle="--", linewidth=1, label="budget")
        axis.set_ylim(bottom=0)
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(loc="best")

    def step_kl(axis: Axes) -> None:
        # At the end of a schedule the bound is close to zero, so show four decades only.
        top = 0.0
        for run, color in zip(runs, colors, strict=True):
            bounds, predicted = run.series("trust/max_kl"), run.series("trust/predicted_kl")
            if bounds[1]:
                axis.plot(*bounds, color=color if several else SECOND, alpha=0.4, linewidth=5, label="bound")
            _line(axis, *predicted, color, f"{run.name}: predicted" if several else "predicted")
            top = max([top, *predicted[1], *bounds[1]])
        axis.legend(loc="lower left")
        if top > 0:
            axis.set_yscale("log")
            axis.set_ylim(top / 1e4, 2 * top)

    def scale(axis: Axes) -> None:
        for run, color in zip(runs, colors, strict=True):
            factor = run.series("trust/factor/holdout")
            if factor[1]:
                axis.plot(*factor, ":", color=color if several else SECOND, label="hold-out factor")
                axis.legend(loc="best")
            _line(axis, *run.series("trust/scale"), color)
        axis.set_ylim(0, 1.05)

    if any(list(_losses(run)) for run in runs):
        panels += [("loss (nats per token)", losses)]
    panels += [
        ("KL from base (estimate, nats per token)", base),
        ("KL of a step (nats per token)", step_kl),
        ("trust scale", scale),
    ]
    axes = canvas.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, draw) in zip(axes, panels, strict=True):
        axis.set_title(title)
        for step in (step for run in runs for step in run.event_steps):
            axis.axvline(step, color=INK, alpha=0.15, linewidth=0.8)
        draw(axis)
        axis.set_xlim(0, max(1, *(run.last_step for run in runs)))
        axis.set_xlabel("step")
        axis.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)


def _losses(run: Run) -> Iterator[tuple[str, str, str, str]]:
    """Yield the losses that a run logged, each as name, key, colour and line style."""
    for what, key, color, style in (
        ("training", "loss", ACCENT, "-"),
        ("evaluation", run.eval_key or "eval_loss", SECOND, "o--"),
        ("hold-out", "holdout/loss", INK, "s:"),
    ):
        if run.series(key)[1]:
            yield what, key, color, style


def layers(canvas: Any, run: Run) -> None:
    """Draw maps of modules by blocks: ranks at the end, shares in the KL from base, and shares in the utility."""
    utility, shares = run.last.get("utility") or {}, run.last.get("kl_from_base/layer") or {}
    panels: list[tuple[str, Mapping[str, float], bool]] = [("rank at the end", run.last_ranks, True)]
    panels += [("share in KL from base", _shares(shares), False)] if shares else []
    panels += [("share in utility, last rank event", _shares(utility), False)] if utility else []
    axes = canvas.subplots(1, 3, squeeze=False, sharey=True)[0]
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, values, are_ranks) in zip(axes, panels, strict=False):
        _matrix(axis, run, values, are_ranks)
        axis.set_title(title)


def ranks_over_time(canvas: Any, run: Run) -> None:
    """Draw one heat map of ranks for each module, with blocks as rows and steps as columns."""
    grid = run.grid
    edges = sorted({step for h in run.history.values() for step, _ in h} | {run.last_step})
    edges = edges if len(edges) > 1 else [edges[0], edges[0] + 1]
    rows = -(-len(grid.modules) // 4)
    axes = canvas.subplots(rows, min(4, len(grid.modules)), sharex=True, sharey=True, squeeze=False)
    colors = _rank_colors(run)
    for index, axis in enumerate(axes.flat):
        if index >= len(grid.modules):
            axis.set_axis_off()
            continue
        blocks = {c: name for (r, c), name in grid.names.items() if r == index}
        values = [
            [run.rank(blocks[c], step) if c in blocks else float("nan") for step in edges[:-1]]
            for c in range(len(grid.blocks))
        ]
        mesh = axis.pcolormesh(edges, _edges(len(grid.blocks)), values, rasterized=True, **colors)
        axis.set_title(grid.modules[index])
        _number_blocks(axis.yaxis, run)
        if index % axes.shape[1] == 0:
            axis.set_ylabel("block")
        if index // axes.shape[1] == rows - 1:
            axis.set_xlabel("step")
    bar = canvas.colorbar(mesh, ax=list(axes.flat), label="rank", pad=0.01, fraction=0.04, aspect=30)
    _bare(bar)


def figures(*runs: Run) -> list[Part]:
    """Return the figures of one run or of two: one figure with the curves of all runs, then the figures of each run."""
    found: list[Part] = []
    if any(run.logs for run in runs):
        found += [("curves", partial(curves, runs=runs), 2.6)]
    for run in runs:
        modules, blocks = len(run.grid.modules), len(run.grid.blocks)
        of = f": {run.name}" if len(runs) > 1 else ""
        if modules:
            found += [(f"layers{of}", partial(layers, run=run), 1.1 + 0.27 * modules)]
        if run.event_steps:
            height = 0.5 + -(-modules // 4) * (0.65 + 0.075 * max(8, blocks))
            found += [(f"ranks over time{of}", partial(ranks_over_time, run=run), height)]
    return found


def drawn(parts: Sequence[Part]) -> Figure:
    """Draw several figures into one, one below the other.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'ctr_optim[plot]'") from error
    heights = [height for _, _, height in parts]
    with rc_context(_STYLE):
        figure = Figure(figsize=(12, sum(heights)), layout="constrained")
        places = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
        for place, (_, draw, _) in zip(places, parts, strict=True):
            draw(place)
    return figure


def save_picture(run: Run, file: str | os.PathLike[str], *others: Run) -> None:
    """Save all figures of a run to one image file.

    Args:
        run: the run.
        file: the file to write; its extension selects the format, any that matplotlib supports.
        others: at most one other run, drawn beside the first.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if matplotlib does not know the extension, or the run has neither LoRA layers nor log entries.
    """
    parts = figures(run, *others)
    if not parts:
        raise ValueError(
            f"{file}: nothing to draw, since the run has neither LoRA layers nor log entries; log with EventLog.log()"
        )
    drawn(parts).savefig(file, dpi=150)


# -- pieces -------------------------------------------------------------------------------------------------------


def _line(axis: Axes, steps: list[int], values: list[float], color: str, label: str = "", style: str = "-") -> None:
    """Draw a curve, with markers if it has at most 30 points."""
    style = "o-" if style == "-" and len(steps) <= 30 else style
    axis.plot(steps, values, style, color=color, markersize=3, label=label)


def _rank_colors(run: Run) -> dict[str, Any]:
    """Return a colour map for ranks: blue below the mean rank at the start, orange above it."""
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    first = list(run.first_ranks.values())
    ranks = [rank for h in run.history.values() for _, rank in h]
    middle = sum(first) / len(first)
    reach = max(1.0, middle - min(ranks), max(ranks) - middle)
    return {
        "cmap": LinearSegmentedColormap.from_list("ranks", [_LESS, _SAME, _MORE]),
        "norm": TwoSlopeNorm(middle, middle - reach, middle + reach),
    }


def _matrix(axis: Axes, run: Run, values: Mapping[str, float], are_ranks: bool) -> None:
    """Draw a map of one value per layer, with modules as rows and blocks as columns; ranks are also written as text."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colors = _rank_colors(run) if are_ranks else {
        "cmap": LinearSegmentedColormap.from_list("amounts", _RAMP),
        "norm": Normalize(0, max(values.values(), default=1.0) or 1.0),
    }  # fmt: skip
    cells = run.grid.matrix(values)
    few = len(cells[0]) <= 16
    mesh = axis.pcolormesh(
        _edges(len(cells[0])), _edges(len(cells)), cells, edgecolors=PAPER, linewidth=1.5 if few else 0.5, **colors
    )
    axis.set_ylim(len(cells) - 0.5, -0.5)
    axis.set_yticks(range(len(cells)), run.grid.modules)
    _number_blocks(axis.xaxis, run)
    axis.set_xlabel("block")
    axis.tick_params(length=0)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    if are_ranks and few:
        for (r, c), name in run.grid.names.items():
            axis.text(c, r, f"{values[name]:g}", ha="center", va="center", fontsize=8, color=_on(mesh, values[name]))
    else:
        form = None if are_ranks else "{x:.1%}"
        bar = axis.figure.colorbar(mesh, ax=axis, fraction=0.05, pad=0.02, format=form)
        _bare(bar)


def _bare(bar: Any) -> None:
    """Remove the frame of a colour bar, and the gaps that an SVG shows between its colours."""
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(True)


def _on(mesh: Any, value: float) -> str:
    """Return a text colour that is readable on the cell colour of ``value``."""
    r, g, b, _ = mesh.cmap(mesh.norm(value))
    return "#111111" if 0.3 * r + 0.6 * g + 0.1 * b > 0.5 else "#fafafa"


def _edges(count: int) -> list[float]:
    return [i - 0.5 for i in range(count + 1)]


def _number_blocks(axis: Any, run: Run) -> None:
    """Label the blocks on an axis, with at most 12 ticks."""
    every = -(-len(run.grid.blocks) // 12)
    axis.set_ticks(range(0, len(run.grid.blocks), every), [str(b) for b in run.grid.blocks[::every]])


def _shares(values: Mapping[str, float]) -> dict[str, float]:
    """Return each value divided by the sum of all values."""
    total = sum(values.values())
    return {name: value / total if total > 0 else 0.0 for name, value in values.items()}
