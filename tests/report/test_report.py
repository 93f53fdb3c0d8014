"""What a report shows, against the event log that it was made from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from support import net, optimizer

from ctr_optim.report import Run, read_run, save_page, save_picture
from ctr_optim.report.figures import ACCENT, INK, PAPER, drawn, figures
from ctr_optim.report.log import EventLog, read_events
from ctr_optim.report.run import place
from ctr_optim.report.table import summary

pytest.importorskip("matplotlib", reason="behind the plot extra")


def blocks(count: int = 3) -> Run:
    """A run of two modules in several blocks, and of a layer that stands in none."""
    names = [f"model.layers.{b}.{m}" for b in range(count) for m in ("q", "v")]
    history = {name: [(0, 4), (10, 4 + i), (20, 3)] for i, name in enumerate(names)}
    shares = {name: float(i) for i, name in enumerate([*names, "head"], 1)}
    log = {
        "step": 30, "loss": 2.0, "kl_from_base": sum(shares.values()), "kl_from_base/layer": shares, "utility": {},
        "trust/predicted_kl": 0.01, "trust/max_kl": 0.02, "trust/scale": 1.0, "trust/coupling": 50.0,
        "trust/source": "measured", "skipped_steps": 0,
    }  # fmt: skip
    return Run({**history, "head": [(0, 4)]}, [log])


def axes_of(run: Run, name: str) -> dict[str, Any]:
    """The axes of one figure by their titles."""
    figure = drawn([part for part in figures(run) if part[0] == name], run)
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def cells(axis: Any) -> np.ndarray:
    return axis.collections[0].get_array().filled(np.nan)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers", 3, "self_attn.q_proj")),
        ("layer.12", ("layer", 12, "layer")),
        ("lm_head", ("", None, "lm_head")),
        ("h.0.attn.c_attn2", ("h", 0, "attn.c_attn2")),
    ],
)
def test_where_a_layer_is(name: str, expected: tuple[str, int | None, str]) -> None:
    assert place(name) == expected


def test_encoders_and_decoders_do_not_hide_each_other() -> None:
    names = ["encoder.0.q", "decoder.0.q", "encoder.1.q", "decoder.1.q", "head"]
    grid = Run({name: [(0, 4)] for name in names}, []).grid
    assert sorted(grid.names.values()) == sorted(names)
    assert list(grid.modules) == ["encoder.*.q", "decoder.*.q", "head"] and list(grid.blocks) == [0, 1]


def test_ranks_over_time(run: Path) -> None:
    ranks = {e["step"]: e["ranks"] for e in read_events(run) if e["event"] == "log"}
    found = read_run(run)
    for step, by_layer in ranks.items():
        assert {name: found.rank(name, step) for name in by_layer} == by_layer


def test_the_maps_show_the_ranks() -> None:
    run = blocks()
    maps = axes_of(run, "ranks over time")
    expected = [[4, 4, 3], [4, 6, 3], [4, 8, 3]]  # q's of the three blocks, from step 0, 10 and 20
    assert cells(maps["q"]).tolist() == expected
    at_end = axes_of(run, "layers")["rank at the end"]
    np.testing.assert_equal(cells(at_end), [[3, 3, 3], [3, 3, 3], [4, np.nan, np.nan]])
    assert [text.get_text() for text in at_end.texts] == ["3", "3", "3", "3", "3", "3", "4"]


def test_the_shares_add_up() -> None:
    shares = cells(axes_of(blocks(), "layers")["share in KL from base"])
    np.testing.assert_allclose(np.nansum(shares), 1.0)
    np.testing.assert_allclose(shares[2, 0], 7 / 28)


def test_the_curves_show_the_log(run: Path) -> None:
    logs = [e for e in read_events(run) if e["event"] == "log"]
    axes = axes_of(read_run(run), "curves")
    for title, key in [("trust scale", "trust/scale"), ("KL of a step (nats per token)", "trust/predicted_kl")]:
        curve = axes[title].lines[-1]
        assert list(curve.get_xdata()) == [log["step"] for log in logs]
        assert list(curve.get_ydata()) == [log[key] for log in logs]


@pytest.mark.parametrize("make", [blocks, lambda: blocks(20)], ids=["few blocks", "many blocks"])
def test_the_page_needs_nothing_else(make: Any, tmp_path: Path) -> None:
    run = make()
    save_page(run, tmp_path / "run.html", "a <run>")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "a &lt;run&gt;" in page and "<run>" not in page
    assert "<script" not in page and not re.search(r'(?:src|href)="(?!data:|#)', page) and "url(http" not in page
    for _, value, more in summary(run):
        assert value.replace("->", "→") in page and more in page
    for name in run.history:
        assert f"<th>{name}</th>" in page
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(drawings) == 3 and all(len(ElementTree.fromstring(svg)) for svg in drawings)
    assert not any(color in svg for svg in drawings for color in (INK, PAPER, ACCENT))  # the page's own instead


def test_a_run_in_which_nothing_happened(tmp_path: Path) -> None:
    EventLog(optimizer(net()), tmp_path)
    run = read_run(tmp_path)
    save_picture(run, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    save_page(run, tmp_path / "run.html", "run")
    assert "No rank moved" in (tmp_path / "run.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="nothing to draw"):
        save_picture(Run({}, []), tmp_path / "none.png")
