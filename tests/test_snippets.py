"""Every Python block of README and docs runs without changes in an empty folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from snippets import ELSEWHERE, ROOT, SETUPS, blocks

pytest.importorskip("peft", reason="the blocks' adapters are PEFT's")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
NEEDS = {"trl": "TRL's trainers", "lightning": "Lightning's", "accelerate": "Accelerate's"}


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove stub modules of frameworks and the process group when a test ends."""
    import torch.distributed as dist

    before = dict(sys.modules)
    if find_spec("trl") is not None:
        import trl

        for name in ("SFTConfig", "DPOConfig", "GRPOConfig"):
            monkeypatch.setattr(trl, name, getattr(trl, name))
    yield
    stand_ins = ("llamafactory", "swift", "torchtitan", "ctr_optim.integrations.")
    for name in set(sys.modules) - set(before):
        if name.startswith(stand_ins):
            del sys.modules[name]
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", SETUPS)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(blocks(page)) == len(SETUPS[page]), "tests/snippets.py needs one setup per block"
    names: dict[str, Any] = {}
    for index, (block, setup) in enumerate(zip(blocks(page), SETUPS[page], strict=True)):
        for module, what in NEEDS.items():
            if f"from {module} " in block or f"import {module}" in block:
                pytest.importorskip(module, reason=f"a block is {what}")
        folder = tmp_path / str(index)
        folder.mkdir()
        monkeypatch.chdir(folder)
        names = names if setup is None else {"ASSETS": str(ROOT / "examples" / "assets"), "__name__": "pasted"}
        exec(compile((setup or "") + block, f"{page}, block {index}", "exec"), names)
        trainer = names.get("trainer")
        if trainer is not None:
            said = trainer.optimizer.optimizer.metrics()
            assert said["trust/source"] == "measured" and said["trust/predicted_kl"] > 0


def test_no_page_is_forgotten() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
    found = {page.relative_to(ROOT).as_posix() for page in pages if blocks(page.relative_to(ROOT).as_posix())}
    known = {*SETUPS, *ELSEWHERE, "examples/assets/base5m/README.md"}
    assert found == known, "add a setup for each block of a new page to tests/snippets.py"
