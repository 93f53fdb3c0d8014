"""``retain`` and ``holdout`` in a config: files, datasets, and the evaluation data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attach import trainer_of

from ctr_optim import CTROptimizer
from ctr_optim.integrations import transformers as ours
from ctr_optim.integrations.text import held_out, model_batch, read_texts, retained, token_batches
from ctr_optim.integrations.transformers import CTRCallback, CTRFactory, attach

datasets = pytest.importorskip("datasets", reason="a Dataset is one of the forms")


class Letters:
    """A tokenizer with one token for each letter."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 96 for c in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], return_dict: bool) -> list[int]:
        return [99, *self("".join(m["content"] for m in messages))["input_ids"]]


def flat(batches: list[torch.Tensor]) -> list[int]:
    return torch.cat([batch.flatten() for batch in batches]).tolist()


def test_texts_are_joined_with_an_end_and_cut_into_rows() -> None:
    batches = token_batches(["ab", "cde", "f"], Letters(), length=2, rows=2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 2), (2, 2)]
    assert flat(batches) == [1, 2, 0, 3, 4, 5, 0, 6]  # tokens after the last full row are dropped


def test_no_more_tokens_than_wanted_and_short_text_is_one_row() -> None:
    assert sum(batch.numel() for batch in token_batches(["abc"] * 99, Letters(), length=4, tokens=16)) == 16
    assert flat(token_batches(["ab"], Letters(), length=512)) == [1, 2, 0]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", "ab\n\ncd\n\n"),
        ("a.jsonl", '{"text": "ab"}\n\n{"prompt": "c", "completion": "d"}\n'),
        ("a.jsonl", '"ab"\n{"prompt": "c", "target": "d"}'),
        ("a.json", json.dumps(["ab", {"input_ids": [3, 4]}])),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_files(name: str, content: str, kind: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert flat(retained(kind(tmp_path / name), Letters())) == [1, 2, 0, 3, 4, 0]


def test_datasets_lists_and_chats() -> None:
    rows = datasets.Dataset.from_dict({"text": ["ab", "cd"]})
    assert flat(retained(rows, Letters())) == flat(retained(["ab", "cd"], Letters())) == [1, 2, 0, 3, 4, 0]
    assert flat(retained([{"messages": [{"role": "user", "content": "a"}]}], Letters())) == [99, 1, 0]
    assert flat(retained([{"input_ids": [5, 6]}])) == [5, 6]  # token ids need no tokenizer


def test_a_processor_holds_the_tokenizer() -> None:
    processor = type("Processor", (), {"tokenizer": Letters()})()
    assert flat(retained(["ab"], processor)) == [1, 2, 0]


def test_everything_else_passes() -> None:
    batches = [{"input_ids": torch.ones(2, 3)}]
    for value in (None, "self", "random", torch.ones(2, 3), batches, [torch.ones(2, 3)]):
        assert retained(value) is value


@pytest.mark.parametrize(
    "value, error, message",
    [
        ("selv", ValueError, "got 'selv', expected 'self', 'random' or the path"),
        (["ab"], TypeError, "needs the model's tokenizer"),
        ([{"other": 1}], ValueError, r"a row with \['other'\]"),
        ([""], ValueError, "has 1 tokens, expected at least 2"),
    ],
)
def test_refusals(value: Any, error: type[Exception], message: str) -> None:
    tokenizer = None if error is TypeError else Letters()
    with pytest.raises(error, match=message):
        retained(value, tokenizer)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no text"):
        read_texts(tmp_path / "a.txt")


def test_evaluation_data_as_batches_for_the_model() -> None:
    ids = torch.tensor([[5, 6, 7]])
    batch = {"input_ids": ids, "completion_mask": torch.tensor([[0, 1, 0]]), "extra": [1]}
    assert model_batch(batch)["labels"].tolist() == [[-100, 6, -100]]
    assert model_batch({"input_ids": ids, "labels": ids - 1})["labels"].tolist() == [[4, 5, 6]]
    assert len(held_out("eval", iter([batch] * 9))) == 4
    for batches, message in (
        (None, "no evaluation data"),
        ([], "found none"),
        ([[{"prompt": "a"}]], "no tensor input"),
    ):
        with pytest.raises(ValueError, match=message):
            held_out("eval", batches)
    with pytest.raises(ValueError, match="got 'self'"):
        held_out("self")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return a dict that records the optimizer's arguments ``retain`` and ``holdout``."""
    found: dict[str, Any] = {}

    def build(params: Any, model: Any, retain: Any = None, holdout: Any = None, **options: Any) -> CTROptimizer:
        found.update(retain=retain, holdout=holdout)
        return CTROptimizer(params, model=model, **options)

    monkeypatch.setattr(ours, "CTROptimizer", build)
    return found


def test_a_trainer_tokenises_with_its_own_tokenizer(tmp_path: Path, given: dict[str, Any]) -> None:
    (tmp_path / "keep.txt").write_text("Call me Ishmael.\n\nSome years ago.")
    rows = datasets.Dataset.from_dict({"text": ["It was a dark night."] * 4})
    trainer = trainer_of("SFT", tmp_path, options={"max_steps": 1}, eval_dataset=rows)
    before = torch.get_rng_state()
    attach(trainer, retain=str(tmp_path / "keep.txt"), holdout="eval")
    assert torch.equal(before, torch.get_rng_state())
    trainer.create_optimizer()
    text = trainer.processing_class.decode(flat(given["retain"]))
    assert "Call me Ishmael." in text and "Some years ago." in text
    assert trainer.model(**given["holdout"][0]).loss > 0


def test_the_factory_finds_the_tokenizer_through_the_callback(tmp_path: Path, given: dict[str, Any]) -> None:
    factory = (CTRFactory, {"retain": ["Call me Ishmael."]})
    trainer = trainer_of("SFT", tmp_path, optimizer_cls_and_kwargs=factory, callbacks=[CTRCallback()])
    trainer.create_optimizer()
    assert "Call me Ishmael." in trainer.processing_class.decode(flat(given["retain"]))
