"""A report as one self-contained HTML file, with SVG figures in the reader's light or dark colour scheme."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from ctr_optim.report.figures import ACCENT, INK, PAPER, SECOND, Part, drawn, figures
from ctr_optim.report.run import Run
from ctr_optim.report.table import compared, summary, top
from ctr_optim.report.verdict import verdict

_CAPTIONS = {
    "curves": "Logged values. Dashed lines: loss on evaluation data. Dotted lines: hold-out loss, and its factor on "
    "the bound. Vertical lines: rank events. The logarithmic axis shows four decades.",
    "layers": "Ranks at the end, and each layer's share in the KL from the base model and in the utility. "
    "Blue: below the mean rank at the start; orange: above it.",
    "ranks over time": "One map for each kind of module, with one row for each block of the model.",
}
_HEAD = "<thead><tr><th>layer</th><th>rank</th><th>KL from base</th><th>utility</th></tr></thead>"


def save_page(run: Run, file: str | os.PathLike[str], title: str, *others: Run) -> None:
    """Write a run's report to one HTML file, without scripts and external resources.

    Args:
        run: the run.
        file: the file to write.
        title: heading of the page.
        others: at most one other run, shown beside the first.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    runs = (run, *others)
    template = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    parts = [_figure(part) for part in figures(*runs)]
    if not any(one.event_steps for one in runs):
        parts += ["<p>No rank moved in this run.</p>" if not others else "<p>No rank moved in these runs.</p>"]
    page = template.substitute(
        title=escape(title),
        verdict="".join(f'<p class="verdict">{_named(one, runs)}{escape(verdict(one))}</p>' for one in runs),
        tiles=_comparison(runs) if others else _tiles(run),
        figures="\n".join(parts),
        layers="\n".join(_layers(one, runs) for one in runs if one.history),
    )
    Path(file).write_text(page, encoding="utf-8")


def _named(run: Run, runs: tuple[Run, ...]) -> str:
    """Return the run's name as HTML; empty if there is only one run."""
    return f"<b>{escape(run.name)}.</b> " if len(runs) > 1 else ""


def _figure(part: Part) -> str:
    kind, _, of = part[0].partition(": ")
    caption = f"{of}. {_CAPTIONS[kind]}" if of else _CAPTIONS[kind]
    return f"<figure>{_svg(part)}<figcaption>{escape(caption)}</figcaption></figure>"


def _tiles(run: Run) -> str:
    """Return the summary of one run as HTML, with a tile for each value."""
    tiles = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(value.replace('->', '→'))}<small>{escape(more)}</small></dd></div>"
        for what, value, more in summary(run)
    )
    return f"<dl>{tiles}</dl>"


def _comparison(runs: tuple[Run, ...]) -> str:
    """Return the summary of two runs as an HTML table, with a column for each, headed in the colour of its curves."""
    head, rows = compared(runs)
    colors = ["accent", "second"]
    heads = "".join(
        f'<th style="color:var(--{c})">{escape(name)}</th>' for name, c in zip(head[1:], colors, strict=True)
    )
    cells = [[escape(cell.replace("->", "→")) for cell in row] for row in rows]
    body = "\n".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in cells)
    table = f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll runs">{table}</div>'


def _svg(part: Part) -> str:
    """Return one figure as an SVG element in the page's colours."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": part[0]}
    ):  # text is not drawn as paths; ids are reproducible
        drawn([part]).savefig(out, format="svg", transparent=True, metadata={"Date": None}, dpi=200)
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)  # the page's CSS sets the size
    label = escape(part[0], quote=True).replace("\\", r"\\")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{label}"', svg, count=1)
    for color, name in ((INK, "ink"), (ACCENT, "accent"), (SECOND, "second"), (PAPER, "card")):
        svg = svg.replace(color, f"var(--{name})")
    return svg


def _layers(run: Run, runs: tuple[Run, ...]) -> str:
    """Return HTML tables of a run: the layers with the most KL from the base model, and, folded, all layers."""
    first, every = top(run), list(run.history)
    heading = f"<h2>Layers{f' of {escape(run.name)}' if len(runs) > 1 else ''}</h2>"
    if len(first) == len(every):
        return heading + _table(run, every)
    more = f"<details><summary>All {len(every)} layers</summary>{_table(run, every)}</details>"
    return f"{heading}<p>The {len(first)} layers with the most KL from the base model.</p>{_table(run, first)}{more}"


def _table(run: Run, names: Iterable[str]) -> str:
    """Return an HTML table with a row for each named layer."""
    shares, utility = run.last.get("kl_from_base/layer") or {}, run.last.get("utility") or {}
    most = max(shares.values(), default=0.0) or 1.0
    rows = []
    for name in names:
        ranks = [str(rank) for _, rank in run.history[name]]
        way = " → ".join(ranks if len(ranks) <= 6 else [ranks[0], "…", *ranks[-3:]])
        bar = f'<i style="width:{100 * shares.get(name, 0.0) / most:.1f}%"></i>'
        cells = "".join(
            f"<td>{f'{value[name]:.3g}' if name in value else '-'}{more}</td>"
            for value, more in ((shares, bar), (utility, ""))
        )
        rows.append(f"<tr><th>{escape(name)}</th><td>{way}</td>{cells}</tr>")
    body = "\n".join(rows)
    return f'<div class="scroll"><table>{_HEAD}<tbody>\n{body}\n</tbody></table></div>'
