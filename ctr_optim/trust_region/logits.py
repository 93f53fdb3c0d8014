"""Find logits in a model's output, and compare them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 1024  # Largest number of compared tokens of a slice; more do not make the mean KL more accurate.

_PIECE = 256  # Tokens per chunk of the KL, which limits memory for large vocabularies.

NO_LOGITS = "the model's output holds no logits"

# Names in the outputs of transformers' models: most models; question answering; pretraining; CLIP; segmentation.
_LOGITS = ("logits", "start_logits", "prediction_logits", "logits_per_image", "class_queries_logits")


@dataclass(frozen=True)
class Logits:
    """Logits in a model's output.

    Attributes:
        chunks: float tensors ``(sequences, ..., V)``; several tensors are chunks along the token dimension.
        named: whether the output names them logits. If not, their gradient shows whether they feed a softmax.
    """

    chunks: list[Tensor]
    named: bool

    def whole(self) -> Tensor:
        """Return ``(sequences, ..., V)``, the concatenated chunks."""
        return self.chunks[0] if len(self.chunks) == 1 else torch.cat(self.chunks, 1)


def kl_divergence(here: Tensor, there: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``KL(here || there)`` summed over the counted tokens, and their number; at least in float32.

    Args:
        here, there: logits ``(n, V)``. With V = 1 (regression), they are the means of Gaussians with unit variance.
        counts: ``(n,)`` whether each token counts.

    Returns:
        ``()`` the sum in nats, ``()`` the number of tokens.
    """
    dtype = torch.promote_types(torch.promote_types(here.dtype, there.dtype), torch.float32)

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        if p.shape[-1] == 1:
            return 0.5 * (p - q).square().squeeze(-1)
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        chance = p.exp()
        # A class that both sides mask with -inf must add 0; 0 * (-inf + inf) would be NaN.
        return torch.where(chance > 0, chance * (p - q), 0).sum(-1)

    pieces = zip(*(torch.split(t, _PIECE) for t in (here, there, counts)), strict=True)
    sums = [torch.where(some, divergence(p.to(dtype), q.to(dtype)), 0).sum() for p, q, some in pieces]
    return torch.stack(sums).sum(), counts.sum(dtype=dtype)


def evenly(count: int, phase: int = 0) -> slice:
    """Return a slice of at most :data:`MOST_TOKENS` of ``count`` rows, evenly spaced.

    Args:
        count: number of rows.
        phase: any integer; it shifts the first row, so that several measurements use different rows.
    """
    stride = stride_of(count)
    return slice(phase % stride, None, stride)


def stride_of(count: int) -> int:
    """Return the distance between two compared rows out of ``count``."""
    return max(1, -(-count // MOST_TOKENS))


def logits_of(output: Any) -> Logits | None:
    """Return the logits in a model's output, or None.

    They are the entry of that name, the output itself, a tuple's first float tensor with at least two dimensions, or a
    list of chunks along the tokens (torchtune). Other named entries are not used: TRL's models return
    log-probabilities of single tokens under other names.
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


def unviewed(logits: Tensor) -> Tensor:
    """Return the tensor to hook for the gradient of logits: the base of a view of the same rows, else the logits.

    A linear layer with a bias returns a view of ``(n, V)``. Autograd drops the hooks of a view that a loss changes in
    place, for example to divide by a temperature, but keeps the hooks of the base.
    """
    base = None if torch.compiler.is_compiling() else logits._base
    if base is None or base.dim() < 2 or base.shape[-1] != logits.shape[-1] or base.numel() != logits.numel():
        return logits
    return base if base.requires_grad and base.is_contiguous() and logits.is_contiguous() else logits


def are_log_probabilities(logits: Tensor) -> Tensor:
    """Return ``()`` whether every row of ``(n, V)`` has probabilities that sum to 1."""
    norms = torch.where(torch.isfinite(logits), logits, -torch.inf).float().logsumexp(-1)
    return (norms.abs() < 1e-2).all()


def _chunks_of(output: Any) -> list[Tensor] | None:
    """Return chunks of logits ``(sequences, tokens, V)`` along the tokens; None for any other output."""
    if not isinstance(output, list):
        return None
    if not all(isinstance(t, Tensor) and t.dim() == 3 and t.is_floating_point() for t in output):
        return None
    return output if len({(t.shape[0], t.shape[2], t.dtype) for t in output}) == 1 else None
