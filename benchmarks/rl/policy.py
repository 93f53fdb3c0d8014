"""The policy: a language model that samples completions, and the figures of its predictions.

Shapes: R rows (prompts times group), P prompt tokens (padded on the left), T completion tokens, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.real.measure import evaluating
from benchmarks.rl.arithmetic import Sum, reward

ROWS = 128  # of a batch, where all test prompts are looked at


@dataclass(frozen=True)
class Samples:
    """Completions that a policy gave.

    Attributes:
        ids: ``(R, P + T)`` prompts, then completions.
        attention: ``(R, P + T)`` 0 on padding.
        mask: ``(R, T)`` whether a token is part of the completion; its last one ends the line.
        rewards: ``(R,)`` 0 or 1.
    """

    ids: Tensor
    attention: Tensor
    mask: Tensor
    rewards: Tensor


class Sampler:
    """Draws completions; a completion ends at the end of a line, or after ``new_tokens`` tokens."""

    def __init__(self, tokenizer: Any, new_tokens: int) -> None:
        self.tokenizer, self.new_tokens = tokenizer, new_tokens
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        words = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self.stops = sorted({tokenizer.eos_token_id, *(i for i, word in enumerate(words) if word.startswith("\n"))})

    @torch.no_grad()
    def __call__(self, model: Any, sums: list[Sum], group: int = 1, temperature: float | None = None) -> Samples:
        """Return ``group`` completions of each prompt, neighbours in the batch.

        Args:
            temperature: of sampling; None: the likeliest token each time.
        """
        device = next(model.parameters()).device
        rows = [each for each in sums for _ in range(group)]
        encoded = self.tokenizer([each.prompt for each in rows])["input_ids"]
        length = max(map(len, encoded))
        ids = torch.tensor([[self.pad] * (length - len(row)) + row for row in encoded], device=device)
        attention = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in encoded], device=device)
        how: dict[str, Any] = {"do_sample": False}
        if temperature is not None:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with evaluating(model):
            whole = model.generate(
                input_ids=ids, attention_mask=attention, max_new_tokens=self.new_tokens, pad_token_id=self.pad,
                eos_token_id=self.stops, **how,
            )  # fmt: skip
        completions = whole[:, length:]
        mask = until_first(torch.isin(completions, torch.tensor(self.stops, device=device)))
        texts = self.tokenizer.batch_decode(torch.where(mask, completions, self.pad), skip_special_tokens=True)
        rewards = [reward(text, each.answer) for text, each in zip(texts, rows, strict=True)]
        return Samples(
            whole, torch.cat([attention, mask.to(attention.dtype)], 1), mask, torch.tensor(rewards, device=device)
        )


def until_first(stops: Tensor) -> Tensor:
    """``(R, T)`` True up to and with each row's first True; everywhere in a row without one."""
    return stops.long().cumsum(1) - stops.long() == 0


def log_probabilities(model: Any, samples: Samples, temperature: float = 1.0) -> Tensor:
    """``(R, T, V)`` the policy's log-probabilities at the completions' tokens.

    Rotary positions are relative, so padding on the left changes nothing.
    """
    tokens = samples.mask.shape[1]
    output = model(input_ids=samples.ids, attention_mask=samples.attention, logits_to_keep=tokens + 1)
    return (output.logits[:, -tokens - 1 : -1].float() / temperature).log_softmax(-1)


def of_tokens(log_p: Tensor, samples: Samples) -> Tensor:
    """``(R, T)`` log-probabilities of the tokens that were drawn."""
    tokens = samples.mask.shape[1]
    return log_p.gather(-1, samples.ids[:, -tokens:, None]).squeeze(-1)


def divergence(p: Tensor, q: Tensor, here: Tensor) -> float:
    """Return the mean ``KL(p || q)`` over the tokens ``here``, in nats; 0 where there are none.

    Args:
        p, q: log-probabilities ``(R, T, V)``.
        here: ``(R, T)`` booleans.
    """
    p, q = p[here], q[here]
    return float((p.exp() * (p - q)).sum(-1).mean()) if len(p) else 0.0


def accuracy(model: Any, sampler: Sampler, sums: list[Sum]) -> float:
    """Return the share of right answers, each the likeliest token by token."""
    return float(sampler(model, sums).rewards.mean())


def kl_from_base(model: Any, sampler: Sampler, sums: list[Sum], temperature: float) -> float:
    """Return the mean ``KL(policy || base)`` per token of the policy's own samples, in nats."""
    total, count = 0.0, 0
    for start in range(0, len(sums), ROWS):
        samples = sampler(model, sums[start : start + ROWS], temperature=temperature)
        with evaluating(model):
            p = log_probabilities(model, samples, temperature)
            with model.disable_adapter():
                q = log_probabilities(model, samples, temperature)
        tokens = int(samples.mask.sum())
        total, count = total + tokens * divergence(p, q, samples.mask), count + tokens
    return total / max(1, count)
