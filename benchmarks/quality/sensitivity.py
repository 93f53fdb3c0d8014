"""Sensitivity-LoRA (arXiv 2509.09119) as a baseline: ranks from the diagonal of the Hessian, before training.

Reconstructed from the paper's abstract and a summary, without its exact formulas. From the paper: a global metric, the
trace of the Hessian's diagonal over a weight matrix; a local metric, from the largest entries (top-k) and from the
effective rank of the diagonal; ranks in proportion to both, at a fixed budget. Own choices: the empirical Fisher (mean
squared gradient of a batch) in place of the Hessian's diagonal, the effective rank as the exponential of the entropy
(Roy and Vetterli, 2007), equal weights of the three shares, and ranks between 1 and four times the mean rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOP = 0.01  # share of a matrix's entries that count as most sensitive


def effective_rank(diagonal: Tensor) -> Tensor:
    """Return the exponential of the entropy of the normalised entries, between 1 and their number."""
    share = diagonal.flatten() / diagonal.sum()
    return torch.special.entr(share).sum().exp()


def scores(diagonals: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean of each matrix's shares of the traces, of the top entries and of the effective ranks."""

    def shares(values: list[Tensor]) -> Tensor:
        every = torch.stack(values).double()
        return every / every.sum()

    flat = [d.flatten() for d in diagonals.values()]
    score = shares([d.sum() for d in flat])
    score = score + shares([d.topk(max(1, int(TOP * d.numel()))).values.mean() for d in flat])
    score = score + shares([effective_rank(d) for d in flat])
    return dict(zip(diagonals, (score / 3).tolist(), strict=True))


def allocate(score: Mapping[str, float], size: Mapping[str, int], rank: int) -> dict[str, int]:
    """Return ranks in proportion to the scores, from 1 to ``4 * rank``, within the budget of a uniform ``rank``.

    Args:
        score: positive score of each layer.
        size: parameters of one direction of each layer, ``d_in + d_out``.
        rank: mean rank, which sets the budget.
    """
    budget = rank * sum(size.values())
    ranks = dict.fromkeys(score, 1)
    spent = sum(size.values())
    while True:  # Give one rank at a time to the layer that is furthest below its share.
        open_layers = [n for n in ranks if ranks[n] < 4 * rank and spent + size[n] <= budget]
        if not open_layers:
            return ranks
        best = max(open_layers, key=lambda n: score[n] / ranks[n])
        ranks[best] += 1
        spent += size[best]


def measure(model: nn.Module, batches: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the summed squared gradients of every linear layer's weight except the head's, ``(d_out, d_in)`` each."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
    weights = [m.weight for m in layers.values()]
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    for w in weights:
        w.requires_grad_(True)
    squares = [torch.zeros_like(w) for w in weights]
    for batch in batches:
        for square, grad in zip(squares, torch.autograd.grad(model(**batch).loss, weights), strict=True):
            square.addcmul_(grad, grad)
    for w in weights:
        w.requires_grad_(False)
    for p in frozen:
        p.requires_grad_(True)
    return dict(zip(layers, squares, strict=True))
