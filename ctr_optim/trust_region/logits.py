"""Find logits in a model's output, and compare them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 1024  # of a slice that are looked at, evenly spaced; a mean over more of them tells no more

_PIECE = 256  # tokens at a time: vocabularies are large

IGNORED = -100  # the label of tokens that the loss leaves out

NO_LOGITS = "the model's output holds no logits"

# what transformers' models call them: most; those that answer questions, are pretrained, compare, or segment
_LOGITS = ("logits", "start_logits", "prediction_logits", "logits_per_image", "class_queries_logits")


def kl_divergence(here: Tensor, there: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """``KL(here || there)`` summed over the tokens that count, and their number; in float32 at least.

    Args:
        here, there: logits ``(n, V)``. A single one (regression) is the mean of a Gaussian of unit variance.
        counts: ``(n,)`` whether a token counts.
    """
    dtype = torch.promote_types(torch.promote_types(here.dtype, there.dtype), torch.float32)

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        if p.shape[-1] == 1:
            return 0.5 * (p - q).square().squeeze(-1)
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    pieces = zip(*(torch.split(t, _PIECE) for t in (here, there, counts)), strict=True)
    sums = [torch.where(some, divergence(p.to(dtype), q.to(dtype)), 0).sum() for p, q, some in pieces]
    return torch.stack(sums).sum(), counts.sum(dtype=dtype)


def some_rows(logits: Tensor) -> Tensor:
    """``(n, V)`` rows of logits ``(..., V)``, evenly spaced."""
    rows = logits.flatten(0, -2)
    return rows[:: stride_of(len(rows))]


def stride_of(rows: int) -> int:
    """From one row that is looked at to the next."""
    return max(1, -(-rows // MOST_TOKENS))


def logits_of(output: Any) -> Tensor | None:
    """The logits in a model's output: what is called so, the output itself, or a tuple's first float matrix.

    A list of chunks along the tokens, as torchtune's models give, is put together. Nothing else in an output with names
    is taken for logits: TRL's hold log-probabilities of single tokens.
    """
    if chunks := chunks_of(output):
        return torch.cat(chunks, 1)
    values = output if isinstance(output, (tuple, list)) else (output,)
    if isinstance(output, dict):
        values = [output[name] for name in _LOGITS if name in output]
    elif hasattr(output, "logits"):
        values = (output.logits,)
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 2), None)


def chunks_of(output: Any) -> list[Tensor] | None:
    """Logits ``(sequences, tokens, V)`` in chunks of the tokens; None where the output is something else."""
    if not isinstance(output, list):
        return None
    if not all(isinstance(t, Tensor) and t.dim() == 3 and t.is_floating_point() for t in output):
        return None
    return output if len({(t.shape[0], t.shape[2], t.dtype) for t in output}) == 1 else None
