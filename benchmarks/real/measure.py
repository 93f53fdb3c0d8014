"""Loss, KL from the base model and accuracy of a model, on batches with a limited number of tokens.

With a vocabulary of 49,152 the logits of 4,096 tokens take 0.8 GB, so that several processes fit on one device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.tasks import Example, collate

TOKENS = 4096  # of a batch, padding included


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Set evaluation mode without gradients, and restore each model's mode on exit."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def in_batches(examples: list[Example], tokens: int = TOKENS) -> Iterator[list[int]]:
    """Yield indices, shortest rows first, in batches of at most ``tokens`` tokens with padding (at least one row)."""
    part: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: len(examples[i].ids)):
        if part and (len(part) + 1) * len(examples[index].ids) > tokens:
            yield part
            part = []
        part.append(index)
    if part:
        yield part


def token_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of every target token in nats, shape ``(rows, length - 1)``; other positions are 0."""
    batch = dict(batch)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=-100, reduction="none")
    return losses


def loss_per_token(model: Any, examples: list[Example], device: torch.device) -> float:
    """Return the mean loss of the target tokens, in nats."""
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(model):
        for part in in_batches(examples):
            batch = collate([examples[i] for i in part], device)
            total += token_losses(model, batch).sum()
            count += sum(label != -100 for i in part for label in examples[i].labels[1:])
    return float(total) / count


def kl_per_token(base: Any, model: Any, examples: list[Example], device: torch.device) -> float:
    """Return the mean ``KL(base || model)`` over the target tokens, in nats."""
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(base, model):
        for part in in_batches(examples, TOKENS // 2):
            batch = collate([examples[i] for i in part], device)
            here = batch.pop("labels")[:, 1:] != -100
            p, q = (m(**batch).logits[:, :-1][here].float().log_softmax(-1) for m in (base, model))
            total += (p.exp() * (p - q)).sum()
            count += p.shape[0]
    return float(total) / count


def choices_of(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> tuple[list[Example], list[int]]:
    """Return every choice of every row as an example, and the index of its row."""
    from benchmarks.quality.tasks import encode

    flat, owner = [], []
    for index, row in enumerate(rows):
        for choice in row["choices"]:
            flat.append({"prompt": row["prompt"], "target": choice if choice[:1] == " " else " " + choice})
            owner.append(index)
    return encode(flat, tokenizer, max_length), owner


def accuracy(
    model: Any, rows: list[dict[str, Any]], tokenizer: Any, device: torch.device, max_length: int = 512
) -> dict[str, float]:
    """Return the share of rows whose true choice is the likeliest.

    ``accuracy`` compares log-likelihoods, ``accuracy_norm`` log-likelihoods per token.
    """
    examples, owner = choices_of(rows, tokenizer, max_length)
    likelihood = torch.zeros(len(examples))
    with evaluating(model):
        for part in in_batches(examples):
            batch = collate([examples[i] for i in part], device)
            likelihood[part] = -token_losses(model, batch).sum(-1).cpu()
    tokens = torch.tensor([sum(label != -100 for label in e.labels[1:]) for e in examples])
    result = {}
    for name, scores in (("accuracy", likelihood), ("accuracy_norm", likelihood / tokens)):
        by_row: list[list[float]] = [[] for _ in rows]
        for index, score in zip(owner, scores.tolist(), strict=True):
            by_row[index].append(score)
        right = sum(max(range(len(s)), key=s.__getitem__) == rows[i]["label"] for i, s in enumerate(by_row))
        result[name] = right / len(rows)
    return result
