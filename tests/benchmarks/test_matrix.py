"""Tests of the matrix program: its oracle, one cell of each kind, a crash, its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import exact_kl

pytest.importorskip("peft", reason="the adapters are PEFT's")
pytest.importorskip("transformers", reason="the model is Hugging Face's")

from benchmarks.trust import matrix, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_the_kl_is_the_kl_and_impossible_tokens_count_nothing() -> None:
    p, q = torch.randn(2, 6, 9, dtype=torch.float64)
    assert tiny.kl(p.log_softmax(-1), q.log_softmax(-1)) == pytest.approx(float(exact_kl(p, q).mean()))
    p[:, 7:] = q[:, 7:] = -torch.inf
    expected = float(exact_kl(p[:, :7], q[:, :7]).mean())
    assert tiny.kl(p.log_softmax(-1), q.log_softmax(-1)) == pytest.approx(expected)


def test_every_wrapper_adapter_and_form_has_cells() -> None:
    found = matrix.cells()
    assert len(found) == len(set(found))
    for index, names in enumerate((matrix.WRAPPERS, matrix.ADAPTERS, matrix.FORMS)):
        assert {cell[index] for cell in found} == set(names)


@pytest.mark.parametrize("form", tiny.FORMS)
def test_the_forward_that_measures_says_what_the_loss_says(form: str) -> None:
    """Compute the loss of the training forward from the meter's predictions."""
    model, batch = tiny.model_of(form), tiny.batch_of(form, 0)
    out = model(**batch)
    loss = out[0] if isinstance(out, tuple) else out.loss
    log_p = tiny.predictions(model, form, batch)
    if form == "ctc":
        again = tiny.ctc_loss(log_p.view(tiny.ROWS, tiny.LENGTH, -1), batch["labels"])
    else:
        counted = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100] if batch["labels"].dim() == 2 else None
        targets = torch.arange(len(log_p)) if form == "contrastive" else batch["labels"]
        targets = targets if counted is None else counted
        again = -log_p.gather(-1, targets[:, None]).mean()
    assert float(loss) == pytest.approx(float(again), rel=1e-4)


@pytest.mark.parametrize("wrapper", ["none", "Trainer", "Lightning", "TRL DPO", "TRL RLOO"])
def test_a_cell(wrapper: str, tmp_path: Path) -> None:
    result = matrix.measure((wrapper, "lora", "attached"), 3, tmp_path)
    assert "crash" not in result and result["source"] == "measured" and result["steps"] >= 3
    assert 0 < result["median"] <= result["largest"] < 10


def test_a_crash_is_a_result_and_stands_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("as bad as it gets")

    monkeypatch.setattr(matrix, "train", fails)
    result = matrix.measure(("none", "lora", "attached"), 3, tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter\n")
    matrix.insert(page, matrix.tables([result]))
    text = page.read_text()
    assert "crash (RuntimeError)" in text and "old" not in text and text.endswith("after\n")
