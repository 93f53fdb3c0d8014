"""From a name in a config to batches: ``retain`` and ``holdout`` given as a file, a dataset or ``"eval"``.

Every function is pure but for reading files. The result is what ``CTROptimizer(retain=..., holdout=...)`` takes: the
text ``"self"``, or a list of batches, each a tensor ``(B, S)`` of token ids or a dict for ``model(**batch)``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH = 512  # tokens a row
ROWS = 8  # rows a batch
TOKENS = 16_384  # in all; more of them do not change the measured statistics
HELD_OUT = 4  # batches that judge the bound; each costs a forward when it is asked

_FOR_MODELS = ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids")


def retained(value: Any, tokenizer: Any = None, *, length: int = LENGTH, rows: int = ROWS, tokens: int = TOKENS) -> Any:
    """The ``retain`` argument that a config's value names.

    Args:
        value: ``"self"``; the path of a ``.txt``, ``.jsonl`` or ``.json`` file; a ``datasets.Dataset``, or a list of
            texts or of rows; anything else (None, batches, a ``Retention``) is returned as it is.
        tokenizer: of the model; needed for texts. A processor with a ``tokenizer`` serves as well.
        length: tokens a row; texts are joined, with the end-of-text token between them, and cut into such rows.
        rows: rows a batch.
        tokens: most tokens in all.

    Raises:
        ValueError: no file of that name, an empty one, or rows without text or token ids.
        TypeError: text without a tokenizer.
    """
    if value is None or (isinstance(value, str) and value == "self") or isinstance(value, Tensor):
        return value
    if isinstance(value, (str, Path)):
        return token_batches(read_texts(value), _callable(tokenizer), length=length, rows=rows, tokens=tokens)
    if _is_dataset(value) or (isinstance(value, list) and value and _is_row(value[0])):
        return token_batches(value, _callable(tokenizer), length=length, rows=rows, tokens=tokens)
    return value


def held_out(value: Any, eval_batches: Iterable[Any] | None = None, tokenizer: Any = None, **sizes: int) -> Any:
    """The ``holdout`` argument that a config's value names.

    Args:
        value: ``"eval"`` for the first batches of the trainer's evaluation data; else as in :func:`retained`.
        eval_batches: batches of the trainer's evaluation loader.
        tokenizer: as in :func:`retained`.
        sizes: as in :func:`retained`; by default four batches.

    Raises:
        ValueError: ``"eval"`` without evaluation data, or with batches that no causal model takes.
    """
    if isinstance(value, str) and value == "eval":
        if eval_batches is None:
            raise ValueError(
                "holdout: got 'eval', but there is no evaluation data; pass eval_dataset= to the trainer and call "
                "attach(trainer, holdout='eval'), or give batches"
            )
        found = [model_batch(batch) for batch in islice(eval_batches, HELD_OUT)]
        if not found:
            raise ValueError("holdout: got 'eval', expected at least one batch of evaluation data, found none")
        return found
    if isinstance(value, str) and value == "self":
        raise ValueError("holdout: got 'self', expected 'eval', a file, a dataset or batches; its loss needs real text")
    limits = {"tokens": HELD_OUT * ROWS * LENGTH, **sizes}
    return retained(value, tokenizer, **limits)


def model_batch(batch: Any) -> dict[str, Tensor]:
    """A trainer's batch as a dict for ``model(**batch)``; labels from TRL's ``completion_mask`` where it has none.

    Raises:
        ValueError: a batch without a tensor ``input_ids``.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        has = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"holdout: got 'eval', but a batch of the evaluation data has no tensor input_ids ({has}); give batches, a "
            "file or a dataset with text instead"
        )
    found = {name: batch[name] for name in _FOR_MODELS if isinstance(batch.get(name), Tensor)}
    if "labels" not in found:
        counts = batch.get("completion_mask", batch.get("attention_mask"))
        found["labels"] = ids.clone() if counts is None else ids.masked_fill(counts == 0, -100)
    return found


def token_batches(
    texts: Iterable[Any], tokenizer: Any, *, length: int = LENGTH, rows: int = ROWS, tokens: int = TOKENS
) -> list[Tensor]:
    """Texts, joined and cut, as tensors ``(rows, length)`` of token ids; fewer than ``length`` tokens make one row.

    Raises:
        ValueError: fewer than two tokens in all.
    """
    stream = list(islice(_stream(texts, tokenizer), tokens))
    if len(stream) < 2:
        raise ValueError(f"retain: the text has {len(stream)} tokens, expected at least 2 and better {TOKENS}")
    length = min(length, len(stream))
    table = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    return list(torch.split(table, rows))


def read_texts(path: str | Path) -> list[Any]:
    """The texts of a file: paragraphs of a ``.txt``, lines of a ``.jsonl``, the list in a ``.json``.

    Raises:
        ValueError: there is no such file, or it holds nothing.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"retain: got {str(path)!r}, expected 'self' or the path of a .txt, .jsonl or .json file")
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        texts = [json.loads(line) for line in content.splitlines() if line.strip()]
    elif file.suffix == ".json":
        texts = json.loads(content)
    else:
        texts = [part for part in content.split("\n\n") if part.strip()]
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"retain: {str(path)!r} holds no text, expected a list of texts or paragraphs")
    return texts


def _stream(texts: Iterable[Any], tokenizer: Any) -> Iterator[int]:
    """Token ids of all texts, an end-of-text token after each."""
    for row in texts:
        yield from _ids(row, tokenizer)
        end = getattr(tokenizer, "eos_token_id", None)
        if end is not None:
            yield int(end)


def _ids(row: Any, tokenizer: Any) -> Sequence[int]:
    """Token ids of one text or row."""
    if isinstance(row, Mapping) and row.get("input_ids") is not None:
        ids: Sequence[int] = torch.as_tensor(row["input_ids"]).flatten().tolist()
        return ids
    if tokenizer is None:
        raise TypeError(
            "retain: text needs the model's tokenizer; pass processing_class= to the trainer, add CTRCallback to its "
            "callbacks, or give token ids"
        )
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        return _ids({"input_ids": tokenizer.apply_chat_template(row["messages"], return_dict=False)}, tokenizer)
    found: Sequence[int] = tokenizer(_text(row), add_special_tokens=False)["input_ids"]
    return found


def _text(row: Any) -> str:
    """The text of a row: ``text``, or ``prompt`` and ``completion`` (``target``, ``chosen``) one after the other."""
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        names = [name for name in ("prompt", "completion", "target", "chosen") if isinstance(row.get(name), str)]
        text = row["text"] if isinstance(row.get("text"), str) else "".join(row[name] for name in names)
        if text:
            return text
    shown = sorted(row) if isinstance(row, Mapping) else type(row).__name__
    raise ValueError(f"retain: got a row with {shown}, expected a text, or text, messages, input_ids or prompt in it")


def _callable(tokenizer: Any) -> Any:
    """The tokenizer within a processor of several kinds of input."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _is_dataset(value: Any) -> bool:
    """Whether this is a ``datasets.Dataset`` or ``IterableDataset``, without importing the library."""
    return type(value).__module__.partition(".")[0] == "datasets"


def _is_row(value: Any) -> bool:
    """Whether a list of these holds texts and not batches."""
    return isinstance(value, str) or (
        isinstance(value, Mapping) and not any(isinstance(v, Tensor) and v.dim() > 1 for v in value.values())
    )
