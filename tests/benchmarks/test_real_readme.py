"""The README's table and picture, compared with the result lines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ctr_optim import __version__

pytest.importorskip("matplotlib", reason="behind the plot extra")

from benchmarks.real import readme

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_is_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = re.search(r"`python -m benchmarks\.real readme (.*) --out docs`", README)
    shown = re.search(r"<!-- table: begin -->\n(.*?)<!-- table: end -->", README, flags=re.S)
    assert command and shown
    monkeypatch.chdir(ROOT)
    readme.main([*command[1].split(), "--out", str(tmp_path)])
    assert capsys.readouterr().out == shown[1]
    assert (tmp_path / readme.FILE).read_bytes().startswith(b"\x89PNG")


def line(method: str, loss: float, text: float, **spec: object) -> str:
    whole = {**readme.DEFAULTS, "method": method, "retain": "none" if method == "ctr" else None, **spec}
    return json.dumps({"spec": whole, "loss": loss, "validation": loss, "text": text})


def test_which_runs_count(tmp_path: Path) -> None:
    lines = [
        line("adamw", 3.0, 2.0, lr=2e-4, steps=0),
        line("adamw", 1.5, 2.1, lr=2e-4), line("adamw", 1.2, 2.3, lr=8e-4), line("adamw", 1.4, 2.3, lr=8e-4, seed=1),
        line("adamw", 0.1, 2.3, lr=8e-4, rank=2),  # another setting
        line("ctr", 1.1, 2.2), line("ctr", 9.0, 9.0),  # the first of equal specifications counts
        line("ctr", 0.2, 2.2, options={"max_kl": 1.0}), line("ctr", 0.3, 2.2, kl_budget=0.1),  # no defaults
        line("ctr", 1.0, 2.0, retain=readme.WIKITEXT, options={"kl_schedule": "lr"}),
    ]  # fmt: skip
    records = [json.loads(text) for text in lines]
    [row] = readme.table(readme.tasks_of(readme.first_of_each(records)))[2:]
    assert row == "| e2e | 1.500 (+0.10) | 1.300 (+0.30) at 8e-4, 2 seeds | 1.100 (+0.20) | **1.000** (+0.00)† |"


def test_the_version_is_one() -> None:
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in cited
    assert f"Version {__version__} " in README and f"version = {{{__version__}}}" in README
