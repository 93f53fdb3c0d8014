"""Read rows of a JSON Lines file, and build batches for a causal language model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctr_optim.settings import IGNORED

_FORMS = '{"prompt": ..., "completion": ...} (or "target"), {"messages": [...]}, or {"text": ...}'


def read_rows(file: str | os.PathLike[str], most: int | None = None) -> list[dict[str, Any]]:
    """Return the first ``most`` rows of a JSON Lines file; all rows if ``most`` is None.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, or a line is not a JSON object.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a JSON Lines file with rows such as {_FORMS}")
    rows: list[dict[str, Any]] = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if most is not None and len(rows) == most:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error}); write one JSON object a line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: got a {type(row).__name__}, expected {_FORMS}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{file}: got no rows, expected {_FORMS}")
    return rows


def encode(row: Mapping[str, Any], tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    """Return token ids and labels of one row. The loss covers the completion, the last message, or the whole text.

    A row longer than ``max_length`` tokens loses the start of the prompt first, then the end of the completion.

    Args:
        row: a row with ``prompt`` and ``completion`` (or ``target``), with ``messages``, or with ``text``.
        tokenizer: the model's tokenizer.
        max_length: largest number of tokens.

    Raises:
        ValueError: the row has none of these forms.
    """
    completion = row.get("completion", row.get("target"))
    if "prompt" in row and completion is not None:
        prompt = tokenizer(row["prompt"])["input_ids"]
        target = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    elif "messages" in row:
        *before, last = row["messages"]
        prompt = _chat(tokenizer, before, True) if before else []
        target = _chat(tokenizer, [*before, last], False)[len(prompt) :]
    elif "text" in row:
        prompt, target = [], tokenizer(row["text"])["input_ids"]
    else:
        raise ValueError(f"rows: got the keys {sorted(row)}, expected {_FORMS}")
    target = target[:max_length]
    prompt = prompt[max(0, len(prompt) + len(target) - max_length) :]
    return prompt + target, [IGNORED] * len(prompt) + target


def batches_of(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, size: int, max_length: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Return right-padded batches of ``size`` rows of similar length, as dicts for ``model(**batch)``.

    Raises:
        ValueError: a row has an unknown form.
    """
    encoded = sorted((encode(row, tokenizer, max_length) for row in rows), key=lambda pair: len(pair[0]))
    return [_collate(encoded[i : i + size], device) for i in range(0, len(encoded), size)]


def _collate(rows: Sequence[tuple[list[int], list[int]]], device: torch.device) -> dict[str, Tensor]:
    length = max(len(ids) for ids, _ in rows)

    def padded(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([some + [value] * (length - len(some)) for some in lists], device=device)

    return {
        "input_ids": padded([ids for ids, _ in rows], 0),
        "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
        "labels": padded([labels for _, labels in rows], IGNORED),
    }


def _chat(tokenizer: Any, messages: list[Any], prompt: bool) -> list[int]:
    """Return token ids of a conversation in the tokenizer's chat template."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
