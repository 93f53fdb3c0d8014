"""Convert ``retain`` and ``holdout`` of a config (a file, a dataset or ``"eval"``) to batches.

The results are valid arguments of ``CTROptimizer(retain=..., holdout=...)``: ``"self"``, or a list of batches. A batch
is a tensor ``(B, S)`` of token ids, or a dict for ``model(**batch)``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctr_optim.retention.source import SOURCES

LENGTH = 512  # tokens in a row
ROWS = 8  # rows in a batch
TOKENS = 16_384  # most tokens of retained text; more tokens do not change the measured statistics
HELD_OUT = 4  # number of hold-out batches; each costs one forward pass at every hold-out measurement

_FOR_MODELS = ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids")


def retained(value: Any, tokenizer: Any = None, *, length: int = LENGTH, rows: int = ROWS, tokens: int = TOKENS) -> Any:
    """Return the ``retain`` argument for a value of a config.

    Args:
        value: the path of a ``.txt``, ``.jsonl`` or ``.json`` file, a ``datasets.Dataset``, or a list of texts or rows.
            Other values (``"self"``, ``"random"``, None, batches, a ``Retention``) are returned unchanged.
        tokenizer: the model's tokenizer, or a processor with a ``tokenizer``. Needed for texts.
        length: tokens in a row. Texts are joined, with the end-of-text token after each, and cut into rows.
        rows: rows in a batch.
        tokens: largest number of tokens in total.

    Raises:
        ValueError: the file does not exist or is empty, or a row has neither text nor token ids.
        TypeError: ``value`` holds text, and there is no tokenizer.
    """
    if value is None or (isinstance(value, str) and value in SOURCES) or isinstance(value, Tensor):
        return value
    if isinstance(value, (str, Path)):
        return token_batches(read_texts(value), _callable(tokenizer), length=length, rows=rows, tokens=tokens)
    if _is_dataset(value) or (isinstance(value, list) and value and _is_row(value[0])):
        return token_batches(value, _callable(tokenizer), length=length, rows=rows, tokens=tokens)
    return value


def held_out(value: Any, eval_batches: Iterable[Any] | None = None, tokenizer: Any = None, **sizes: int) -> Any:
    """Return the ``holdout`` argument for a value of a config.

    Args:
        value: ``"eval"`` for the first batches of the trainer's evaluation data; otherwise as in :func:`retained`.
        eval_batches: batches of the trainer's evaluation loader.
        tokenizer: as in :func:`retained`.
        sizes: ``length``, ``rows`` and ``tokens`` as in :func:`retained`; the default is four batches.

    Raises:
        ValueError: ``value`` is ``"eval"`` and there is no evaluation data, or a batch has no tensor ``input_ids``; or
            ``value`` is ``"self"``; or as in :func:`retained`.
        TypeError: as in :func:`retained`.
    """
    if isinstance(value, str) and value == "eval":
        if eval_batches is None:
            raise ValueError(
                "holdout: got 'eval', but there is no evaluation data; pass eval_dataset= to the trainer and call "
                "attach(trainer, holdout='eval'), or pass batches"
            )
        found = [model_batch(batch) for batch in islice(eval_batches, HELD_OUT)]
        if not found:
            raise ValueError(
                "holdout: got 'eval', expected at least one batch of evaluation data, found none; pass a longer "
                "eval_dataset="
            )
        return found
    if isinstance(value, str) and value in SOURCES:
        raise ValueError(
            f"holdout: got {value!r}, expected 'eval', a file, a dataset or batches; the hold-out loss needs real text"
        )
    limits = {"tokens": HELD_OUT * ROWS * LENGTH, **sizes}
    return retained(value, tokenizer, **limits)


def model_batch(batch: Any) -> dict[str, Tensor]:
    """Convert a trainer's batch to a dict for ``model(**batch)``.

    If the batch has no labels, the input ids become labels, masked with TRL's ``completion_mask`` or else with
    ``attention_mask``.

    Raises:
        ValueError: the batch has no tensor ``input_ids``.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        has = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"holdout: got 'eval', but a batch of the evaluation data has no tensor input_ids ({has}); pass batches, a "
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
    """Join texts, cut them into rows, and return tensors ``(rows, length)`` of token ids.

    Tokens after the last full row are dropped. If all texts have fewer than ``length`` tokens, they make one row.

    Raises:
        ValueError: there are fewer than two tokens, or a row has neither text nor token ids.
        TypeError: there is text and no tokenizer.
    """
    stream = list(islice(_stream(texts, tokenizer), tokens))
    if len(stream) < 2:
        raise ValueError(
            f"retain: the text has {len(stream)} tokens, expected at least 2; pass more text, about {TOKENS} tokens"
        )
    length = min(length, len(stream))
    table = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    return list(torch.split(table, rows))


def read_texts(path: str | Path) -> list[Any]:
    """Return the texts of a file: lines of a ``.jsonl``, the list in a ``.json``, paragraphs of any other file.

    Raises:
        ValueError: the file does not exist, or has no text.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        names = ", ".join(map(repr, SOURCES))
        raise ValueError(f"retain: got {str(path)!r}, expected {names} or the path of a .txt, .jsonl or .json file")
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
    """Yield the token ids of all texts, with the end-of-text token after each text."""
    for row in texts:
        yield from _ids(row, tokenizer)
        end = getattr(tokenizer, "eos_token_id", None)
        if end is not None:
            yield int(end)


def _ids(row: Any, tokenizer: Any) -> Sequence[int]:
    """Return the token ids of one text or row."""
    if isinstance(row, Mapping) and row.get("input_ids") is not None:
        ids: Sequence[int] = torch.as_tensor(row["input_ids"]).flatten().tolist()
        return ids
    if tokenizer is None:
        raise TypeError(
            "retain: text needs the model's tokenizer; pass processing_class= to the trainer, add CTRCallback to its "
            "callbacks, or pass token ids"
        )
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        return _ids({"input_ids": tokenizer.apply_chat_template(row["messages"], return_dict=False)}, tokenizer)
    found: Sequence[int] = tokenizer(_text(row), add_special_tokens=False)["input_ids"]
    return found


def _text(row: Any) -> str:
    """Return the text of a row: ``text``, or the joined ``prompt``, ``completion``, ``target`` and ``chosen``."""
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        names = [name for name in ("prompt", "completion", "target", "chosen") if isinstance(row.get(name), str)]
        text = row["text"] if isinstance(row.get("text"), str) else "".join(row[name] for name in names)
        if text:
            return text
    shown = sorted(row) if isinstance(row, Mapping) else type(row).__name__
    raise ValueError(
        f"retain: got a row with {shown}, expected a text, or a dict with text, messages, input_ids or prompt"
    )


def _callable(tokenizer: Any) -> Any:
    """Return the tokenizer inside a multimodal processor; a tokenizer is returned unchanged."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _is_dataset(value: Any) -> bool:
    """Return whether this is a ``datasets.Dataset`` or ``IterableDataset``, without importing the library."""
    return type(value).__module__.partition(".")[0] == "datasets"


def _is_row(value: Any) -> bool:
    """Return whether a list element is a text or a row, and not a batch."""
    return isinstance(value, str) or (
        isinstance(value, Mapping) and not any(isinstance(v, Tensor) and v.dim() > 1 for v in value.values())
    )
