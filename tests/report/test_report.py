"""Contents of reports, compared with the event log."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from support import net, optimizer

from ctr_optim.report import Run, follow, read_run, save_page, save_picture, side_by_side, table, verdict
from ctr_optim.report.figures import ACCENT, INK, PAPER, drawn, figures
from ctr_optim.report.log import EventLog, read_events
from ctr_optim.report.run import place
from ctr_optim.report.table import TOP, summary, top

pytest.importorskip("matplotlib", reason="behind the plot extra")


def blocks(count: int = 3) -> Run:
    """Return a run with two modules in each of several blocks, and one layer outside of blocks."""
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
    """Return the axes of one figure by title."""
    figure = drawn([part for part in figures(run) if part[0] == name])
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
    expected = [[4, 4, 3], [4, 6, 3], [4, 8, 3]]  # rank of q in the three blocks, from steps 0, 10 and 20
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
    assert not any(color in svg for svg in drawings for color in (INK, PAPER, ACCENT))  # the page uses its own colours


def test_a_run_in_which_nothing_happened(tmp_path: Path) -> None:
    EventLog(optimizer(net()), tmp_path)
    run = read_run(tmp_path)
    save_picture(run, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    save_page(run, tmp_path / "run.html", "run")
    assert "No rank moved" in (tmp_path / "run.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="nothing to draw"):
        save_picture(Run({}, []), tmp_path / "none.png")


# -- evaluation, hold-out, verdict ------------------------------------------------------------------------------------


def judged(name: str = "judged", evals: Sequence[float] = (2.2, 2.0, 2.1), **metrics: Any) -> Run:
    """Return a run of 30 steps, in 20 of which the bound acted, with an evaluation every ten steps."""
    whole = {"kl_from_base": 0.31, "trust/predicted_kl": 0.01, "trust/max_kl": 0.02, "trust/coupling": 50.0}
    whole |= {"trust/source": "measured", "skipped_steps": 0, **metrics}
    logs = [{"step": s, "loss": 3.0 - s / 30, "trust/scale": 0.5 if s <= 20 else 1.0, **whole} for s in range(1, 31)]
    return Run({"a.0.q": [(0, 4)]}, logs, [{"step": 10 * (i + 1), "eval_loss": v} for i, v in enumerate(evals)], name)


BUDGET = {"budget/used": 0.31, "budget/limit": 0.5}


@pytest.mark.parametrize(
    "run, said",
    [
        (judged(**BUDGET), ["acted in 20 of 30 logged steps", "0.31 of 0.50 nats", "eval loss best at step 20 (2)"]),
        (judged(), ["0.31 nats per token from the base", "0.1 nats higher at the end"]),
        (judged(evals=(2.2, 2.1, 2.0)), ["eval loss best at the end, step 30 (2)."]),
        (judged(evals=()), ["(an estimate)."]),
        (judged(**{"holdout/loss": 1.5}), ["hold-out loss best at step 1 (1.5)"]),
        (judged(**{"trust/max_kl": None}), ["No step was bounded in KL"]),
        (judged(**{"trust/source": "assumed: no logits"}), ["The KL was not measured (assumed: no logits)"]),
        (judged(skipped_steps=1), ["1 step skipped"]),
        (Run({}, []), ["Nothing was logged"]),
    ],
    ids=[
        "budget",
        "no budget",
        "best at the end",
        "no evaluation",
        "hold-out",
        "no bound",
        "assumed",
        "skipped",
        "bare",
    ],
)
def test_the_verdict(run: Run, said: list[str]) -> None:
    assert all(piece in verdict(run) for piece in said), verdict(run)


def test_evaluations_are_read_and_drawn(tmp_path: Path) -> None:
    log = EventLog(optimizer(net()), tmp_path)
    log.log(loss=2.0)
    log.evaluated(eval_loss=1.5, eval_runtime=1.0)
    run = read_run(tmp_path)
    assert run.eval_key == "eval_loss" and run.series("eval_loss") == ([0], [1.5])
    assert "best 1.5 at step 0" in table(run)


@pytest.mark.parametrize(
    "name, is_loss",
    [("eval_loss", True), ("val/loss", True), ("eval_wiki_loss", True), ("eval_lossy", False), ("loss", False)],
)
def test_names_of_evaluation_losses(name: str, is_loss: bool) -> None:
    assert (Run({}, [], [{"step": 1, name: 1.0}]).eval_key == name) is is_loss


def test_the_losses_are_drawn_together() -> None:
    run = judged(**{"holdout/loss": 1.5, "trust/factor/holdout": 0.5}, **BUDGET)
    axes = axes_of(run, "curves")
    lines = {line.get_label(): list(line.get_ydata()) for line in axes["loss (nats per token)"].lines}
    assert lines["evaluation"] == [2.2, 2.0, 2.1] and lines["hold-out"] == [1.5] * 30 and len(lines["training"]) == 30
    assert [line.get_label() for line in axes["KL from base (estimate, nats per token)"].lines] == ["judged", "budget"]
    assert list(axes["trust scale"].lines[0].get_ydata()) == [0.5] * 30


def test_one_curve_needs_no_legend() -> None:
    axes = axes_of(blocks(), "curves")  # lines that mark rank events need no legend
    assert axes["loss (nats per token)"].get_legend() is None


def test_ten_layers_unless_all_are_wanted() -> None:
    run = blocks(20)
    shares = run.last["kl_from_base/layer"]
    named = [line.split()[0] for line in table(run).splitlines() if line.split() and line.split()[0] in run.history]
    assert named == top(run) == sorted(shares, key=lambda name: -shares[name])[:TOP]
    assert "10 of 41 layers" in table(run) and "10 of 41" not in table(run, every=True)
    named = [line.split()[0] for line in table(run, every=True).splitlines() if line.split()]
    assert [name for name in named if name in run.history] == list(run.history)


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    one, other = judged("one", **BUDGET), judged("<other>", evals=())
    text = side_by_side([one, other])
    cells = {line[: line.find("  ")].strip(): line for line in text.splitlines() if line.strip()}
    assert "one: " + verdict(one) in text and "<other>: " + verdict(other) in text
    assert cells["budget"].split()[1:] == ["0.31", "of", "0.5", "nats", "-"]
    [figure] = [drawn([part]) for part in figures(one, other) if part[0] == "curves"]
    assert {len(axis.lines) for axis in figure.axes if "scale" in axis.get_title(loc="left")} == {2}
    assert [name for name, *_ in figures(one, other)] == ["curves", "layers: one", "layers: <other>"]
    save_page(one, tmp_path / "both.html", "one and <other>", other)
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "<other>" not in page and page.count('class="verdict"') == 2 and "<b>&lt;other&gt;.</b>" in page
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(drawings) == 3 and all(len(ElementTree.fromstring(svg)) for svg in drawings)


# -- live -----------------------------------------------------------------------------------------------------------


def test_a_run_is_followed_while_it_trains(tmp_path: Path) -> None:
    """Between reads, the run starts and writes first one half of a line, then the other half."""
    file = tmp_path / "events.jsonl"
    log = '{"event": "log", "step": 5, "loss": 2.5, "kl_from_base": 0.25, "trust/max_kl": 0.1, "trust/scale": 0.5}\n'
    pieces = iter(['{"event": "start", "step": 0, "ranks": {"a": 4}}\n' + log[:30], log[30:], "not json\n"])

    def wait() -> bool:
        piece = next(pieces, None)
        if piece is not None:
            with file.open("a", encoding="utf-8") as events:
                events.write(piece)
        return piece is not None

    start, line = follow(tmp_path, wait)
    assert "1 LoRA layers" in start
    assert " ".join(line.split()) == "step 5 loss 2.5000 KL from base 0.250 bound 0.1 nats, scale 0.5"
