"""The notebook was executed, is small, and its code runs in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "examples" / "notebook.ipynb"
CELLS = [{**cell, "source": "".join(cell["source"])} for cell in json.loads(FILE.read_text(encoding="utf-8"))["cells"]]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]

PLACES = [*(f"/{folder}/" for folder in ("home", "work", "tmp", "root")), "C:\\\\"]  # paths of a single machine


def test_it_was_executed_and_is_small() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds <= {"stream", "display_data", "execute_result"} and any(
        "image/png" in o.get("data", {}) for o in outputs
    )
    text = FILE.read_text(encoding="utf-8")
    assert len(text) < 200_000 and not any(place in text for place in PLACES)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each cell in order, in an empty folder, with 2 steps in place of 40."""
    pytest.importorskip("peft", reason="the adapter is PEFT's")
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="the notebook draws")
    pyplot.switch_backend("Agg")
    (tmp_path / "assets").symlink_to(FILE.parent / "assets")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    assert sum(cell["source"].count("steps = 40") for cell in CODE) == 1
    for number, cell in enumerate(CODE, 1):
        source = cell["source"].replace("steps = 40", "steps = 2").replace("max_new_tokens=40", "max_new_tokens=2")
        exec(compile(source, f"cell {number}", "exec"), names)
    pyplot.close("all")
    assert all(len(losses) == 2 for losses in names["curves"].values()) and len(names["curves"]) == 4
    assert names["opt"].metrics()["trust/source"] == "measured"
    assert (tmp_path / "runs" / "notebook" / "adapter" / "adapter_config.json").is_file()
