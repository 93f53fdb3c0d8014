"""Find logits in a model's output, and compare them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 1024  # of a slice that are looked at, evenly spaced; a mean over more of them tells no more

_PIECE = 256  # tokens at a time: vocabularies are large

NO_LOGITS = "the model's output holds no logits"

# what transformers' models call them: most; those that answer questions, are pretrained, compare, or segment
_LOGITS = ("logits", "start_logits", "prediction_logits", "logits_per_image", "class_queries_logits")


@dataclass(frozen=True)
class Logits:
    """Logits in a model's output.

    Attributes:
        chunks: float tensors ``(sequences, ..., V)``; several of them are chunks along the tokens.
        named: whether the output calls them logits. Otherwise only their gradient tells whether they feed a softmax.
    """

    chunks: list[Tensor]
    named: bool

    def whole(self) -> Tensor:
        """``(sequences, ..., V)`` all chunks together."""
        return self.chunks[0] if len(self.chunks) == 1 else torch.cat(self.chunks, 1)


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
        chance = p.exp()
        # a class that is masked out (-inf) on both sides adds nothing; 0 * (-inf + inf) would be NaN
        return torch.where(chance > 0, chance * (p - q), 0).sum(-1)

    pieces = zip(*(torch.split(t, _PIECE) for t in (here, there, counts)), strict=True)
    sums = [torch.where(some, divergence(p.to(dtype), q.to(dtype)), 0).sum() for p, q, some in pieces]
    return torch.stack(sums).sum(), counts.sum(dtype=dtype)


def evenly(count: int, phase: int = 0) -> slice:
    """Return a slice of at most :data:`MOST_TOKENS` of ``count`` rows, evenly spaced.

    Args:
        phase: any whole number; it turns the first row, so that several measurements see different rows.
    """
    stride = stride_of(count)
    return slice(phase % stride, None, stride)


def stride_of(count: int) -> int:
    """From one row that is looked at to the next."""
    return max(1, -(-count // MOST_TOKENS))


def logits_of(output: Any) -> Logits | None:
    """The logits in a model's output: what is called so, the output itself, or a tuple's first float matrix.

    A list of chunks along the tokens, as torchtune's models give, is put together. Nothing else in an output with names
    is taken for logits: TRL's hold log-probabilities of single tokens.
    """
    if chunks := _chunks_of(output):
        return Logits(chunks, named=False)
    named, values = False, output if isinstance(output, (tuple, list)) else (output,)
    if isinstance(output, dict):
        named, values = True, [output[name] for name in _LOGITS if name in output]
    elif hasattr(output, "logits"):
        named, values = True, (output.logits,)
    found = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 2), None)
    return None if found is None else Logits([found], named)


def are_log_probabilities(logits: Tensor) -> Tensor:
    """``()`` whether every row of ``(n, V)`` is normalised already."""
    norms = torch.where(torch.isfinite(logits), logits, -torch.inf).float().logsumexp(-1)
    return (norms.abs() < 1e-2).all()


def _chunks_of(output: Any) -> list[Tensor] | None:
    """Logits ``(sequences, tokens, V)`` in chunks of the tokens; None where the output is something else."""
    if not isinstance(output, list):
        return None
    if not all(isinstance(t, Tensor) and t.dim() == 3 and t.is_floating_point() for t in output):
        return None
    return output if len({(t.shape[0], t.shape[2], t.dtype) for t in output}) == 1 else None
