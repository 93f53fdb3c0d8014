"""A run as one HTML file that needs nothing else: figures as SVG, colours of the reader's light or dark scheme."""

from __future__ import annotations

import io
import os
import re
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from ctr_optim.report.figures import ACCENT, INK, PAPER, SECOND, Draw, drawn, figures
from ctr_optim.report.run import Run
from ctr_optim.report.table import summary

_CAPTIONS = {
    "curves": "What was logged. Upright lines mark rank events. The log axis shows four decades.",
    "layers": "Where the ranks went, which layers carry the way from the base model, and which are worth their rank. "
    "Blue: less rank than at the start on average; orange: more.",
    "ranks over time": "One map for each kind of module, a row for each block of the model.",
}


def save_page(run: Run, file: str | os.PathLike[str], title: str) -> None:
    """Write a run's report to one HTML file: no scripts, no network.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    template = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    parts = [
        f"<figure>{_svg([part], run)}<figcaption>{escape(_CAPTIONS[part[0]])}</figcaption></figure>"
        for part in figures(run)
    ]
    if not run.event_steps:
        parts += ["<p>No rank moved in this run.</p>"]
    tiles = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(value.replace('->', '→'))}<small>{escape(more)}</small></dd></div>"
        for what, value, more in summary(run)
    )
    page = template.substitute(title=escape(title), tiles=tiles, figures="\n".join(parts), rows=_rows(run))
    Path(file).write_text(page, encoding="utf-8")


def _svg(part: list[tuple[str, Draw, float]], run: Run) -> str:
    """One figure as an SVG element in the page's colours."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": part[0][0]}):  # text stays text; the same file each time
        drawn(part, run).savefig(out, format="svg", transparent=True, metadata={"Date": None}, dpi=200)
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)  # the page sets its size
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{part[0][0]}"', svg, count=1)
    for color, name in ((INK, "ink"), (ACCENT, "accent"), (SECOND, "second"), (PAPER, "card")):
        svg = svg.replace(color, f"var(--{name})")
    return svg


def _rows(run: Run) -> str:
    """The layers, one table row each."""
    shares, utility = run.last.get("kl_from_base/layer") or {}, run.last.get("utility") or {}
    most = max(shares.values(), default=0.0) or 1.0
    rows = []
    for name, history in run.history.items():
        ranks = [str(rank) for _, rank in history]
        way = " → ".join(ranks if len(ranks) <= 6 else [ranks[0], "…", *ranks[-3:]])
        bar = f'<i style="width:{100 * shares.get(name, 0.0) / most:.1f}%"></i>'
        cells = "".join(
            f"<td>{f'{value[name]:.3g}' if name in value else '-'}{more}</td>"
            for value, more in ((shares, bar), (utility, ""))
        )
        rows.append(f"<tr><th>{escape(name)}</th><td>{way}</td>{cells}</tr>")
    return "\n".join(rows)
