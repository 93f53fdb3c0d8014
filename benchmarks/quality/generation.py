"""Scores of generated text: BLEU and chrF over several references, exact match of the final number."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int, size: int = 128) -> list[str]:
    """Return greedy continuations up to the end-of-text token, computed in left-padded batches."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    encoded = [tokenizer(p)["input_ids"] for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        length = max(len(encoded[i]) for i in part)
        ids = torch.tensor([[pad] * (length - len(encoded[i])) + encoded[i] for i in part], device=device)
        mask = torch.tensor([[0] * (length - len(encoded[i])) + [1] * len(encoded[i]) for i in part], device=device)
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        for i, row in zip(part, output[:, length:], strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    model.train(training)
    return texts


def group_references(rows: list[dict], limit: int) -> dict[str, list[str]]:
    """Return the targets of each of the first ``limit`` distinct prompts."""
    references: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        references[row["prompt"]].append(row["target"].strip())
    return dict(list(references.items())[:limit])


def overlap(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """Return corpus BLEU and chrF of sacrebleu, from 0 to 100. Texts may have different numbers of references."""
    import sacrebleu

    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return {
        "bleu": sacrebleu.corpus_bleu(texts, streams).score,
        "chrf": sacrebleu.corpus_chrf(texts, streams).score,
    }


def final_number(text: str) -> float | None:
    """Return the number after ``####``, or else the last number, as in GSM8K's evaluation."""
    _, mark, answer = text.rpartition("####")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer if mark else text)
    if not numbers:
        return None
    return float((numbers[0] if mark else numbers[-1]).replace(",", ""))


def exact_match(texts: list[str], targets: list[str]) -> float:
    """Return the share of texts whose final number equals the target's."""
    right = [
        final_number(t) is not None and final_number(t) == final_number(g) for t, g in zip(texts, targets, strict=True)
    ]
    return sum(right) / len(right)
