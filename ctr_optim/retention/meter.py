"""Measurement of ``KL(base || model)``, the model's distance from its base in nats per token, by forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ctr_optim.model.pair import LoRAPair
from ctr_optim.retention.passes import IDS, Batch, adapter_off, batches_of, mask_of, run, untouched
from ctr_optim.runtime import distributed

TOKENS = 1024  # tokens of retained text to measure on
_TEXTS = 4  # largest number of batches to take these tokens from
_BYTES = 160 * 2**20  # largest memory of the base model's stored predictions, which have half precision
_PIECE = 256  # tokens per piece: with a large vocabulary, all tokens at once would need too much memory


Text = Callable[[nn.Module], Sequence[Any]]


class CannotMeasure(RuntimeError):
    """Raised if the distance from the base model cannot be measured; the message says why and what to do."""


class Meter(Protocol):
    """Interface: measures the model's distance from its base.

    Attributes:
        on_text: whether the measurement uses retained text.
    """

    on_text: ClassVar[bool]

    def measure(self) -> float:
        """Return ``KL(base || model)`` in nats per token, the same in every process.

        Raises:
            CannotMeasure: if there are no logits to compare.
        """

    def release(self) -> None:
        """Free the memory that is only needed for this step."""


class TextMeter:
    """Meter on a fixed part of the retained text; it computes the base model's predictions once and stores them.

    Args:
        model: the model to run.
        text: function that returns the retained text for a model.
        pairs: the LoRA layers; with every B = 0, the model is the base model.
    """

    on_text: ClassVar[bool] = True

    def __init__(self, model: nn.Module, text: Text, pairs: Sequence[LoRAPair]) -> None:
        self._model, self._text, self._pairs = model, text, list(pairs)
        self._batches: list[Batch | Tensor] = []
        self._base: list[Tensor] | None = None

    def measure(self) -> float:
        if self._base is None:
            some = batches_of(self._text(self._model), self._model, "retain")
            some = some[:: max(1, len(some) // _TEXTS)][:_TEXTS]
            self._batches = [_first_rows(batch, -(-TOKENS // len(some))) for batch in some]
            with adapter_off(self._model, self._pairs):
                self._base = [rows.log_softmax(-1).half() for rows in self._logits()]
        total = torch.stack([_summed_kl(b, here) for b, here in zip(self._base, self._logits(), strict=True)]).sum()
        count = total.new_tensor(float(sum(len(b) for b in self._base)))
        return float(distributed.mean((total, count), total))

    def release(self) -> None:
        """Do nothing: all stored tensors are needed again, since the text stays the same."""

    def _logits(self) -> list[Tensor]:
        """Return logits ``(n, V)`` for each batch, at evenly spaced tokens that are not padding."""
        found = []
        with untouched(self._model):
            for batch in self._batches:
                output = run(self._model, batch)
                output = torch.cat(output, 1) if isinstance(output, list) else output
                logits = getattr(output, "logits", output)
                if not isinstance(logits, Tensor) or logits.dim() < 2:
                    raise CannotMeasure(
                        "kl_budget: the model returns no logits for retained text, so its distance from the base "
                        "model cannot be measured; let forward() return logits, or leave kl_budget out"
                    )
                rows, mask = logits.flatten(0, -2), mask_of(batch)
                rows = rows if mask is None or mask.numel() != len(rows) else rows[mask.flatten()]
                most = max(1, min(TOKENS, _BYTES // (2 * rows.shape[-1])) // len(self._batches))
                found.append(rows[:: -(-len(rows) // most)])
        return found


def _summed_kl(base: Tensor, logits: Tensor) -> Tensor:
    """Return ``()`` KL(base || model), summed over tokens.

    Args:
        base: the base model's log-probabilities ``(n, V)``, in any floating-point dtype.
        logits: the model's logits ``(n, V)``.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    sums = []
    for p, q in zip(torch.split(base, _PIECE), torch.split(logits, _PIECE), strict=True):
        p = p.to(dtype)
        p, q = p - p.logsumexp(-1, keepdim=True), q.to(dtype).log_softmax(-1)
        sums.append(torch.where(p > -torch.inf, p.exp() * (p - q), 0).sum())
    return torch.stack(sums).sum()


def _first_rows(batch: Batch | Tensor, tokens: int) -> Batch | Tensor:
    """Return the first sequences of a batch, with about ``tokens`` tokens in total."""
    ids = batch if isinstance(batch, Tensor) else batch.get(IDS)
    if not isinstance(ids, Tensor) or ids.dim() < 2:
        return batch
    size, keep = ids.shape[0], -(-tokens // ids.shape[1])
    if isinstance(batch, Tensor):
        return batch[:keep]
    return {
        key: value[:keep] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value
        for key, value in batch.items()
    }


class Prober(Protocol):
    """Interface: runs the model again on a slice of the last training batch (:mod:`ctr_optim.trust_region.probe`).

    Attributes:
        refused: why the batch cannot be run again; None if it can.
    """

    refused: str | None

    @property
    def ready(self) -> bool:
        """Whether a batch is stored that can be run again."""

    def release(self) -> None:
        """Free the stored batch."""

    def logits(self) -> Tensor | None:
        """Return logits ``(n, V)`` with the current parameters; None if the model returns none."""

    def loss_tokens(self, logits: Tensor) -> Tensor:
        """Return ``(n,)`` whether each token counts in the loss."""


class BatchMeter:
    """Meter on the loss tokens of the last training batch, for use without retained text.

    Args:
        model: the model that holds the LoRA layers.
        prober: runs the model again on the batch.
        quiet: returns a context in which the hooks collect no statistics.
        pairs: the LoRA layers.
    """

    on_text: ClassVar[bool] = False

    def __init__(
        self, model: nn.Module, prober: Prober, quiet: Callable[[], AbstractContextManager[None]],
        pairs: Sequence[LoRAPair],
    ) -> None:  # fmt: skip
        self._model, self._prober, self._quiet, self._pairs = model, prober, quiet, list(pairs)

    def release(self) -> None:
        self._prober.release()

    @torch.no_grad()
    def measure(self) -> float:
        here = base = None
        like = self._pairs[0].B
        if bool(distributed.everywhere(self._prober.ready, distributed.local(like))):
            with self._quiet():
                here = self._prober.logits()
                with adapter_off(self._model, self._pairs):
                    base = self._prober.logits()
        found = here is not None and base is not None and here.shape == base.shape
        if not bool(distributed.everywhere(found, distributed.local(like))) or here is None or base is None:
            raise CannotMeasure(
                "kl_budget: the distance from the base model cannot be measured on the training batch "
                f"({self._prober.refused or 'no forward pass of the model was seen'}); pass retain=batches to measure "
                "on retained text, or leave kl_budget out"
            )
        counts = self._prober.loss_tokens(here)
        total = _summed_kl(base[counts].log_softmax(-1), here[counts])
        return float(distributed.mean((total, counts.sum()), total))


def meter_of(
    model: nn.Module | None,
    pairs: Sequence[LoRAPair],
    text: Text | None,
    prober: Prober | None,
    quiet: Callable[[], AbstractContextManager[None]],
) -> Meter:
    """Return a meter on retained text, or on the training batch if there is no text.

    Args:
        model: the model that holds all LoRA layers; None if no single model does.
        pairs: the LoRA layers.
        text: function that returns the retained text for a model; None without text.
        prober: runs the training batch again; None without one.
        quiet: returns a context in which the hooks collect no statistics.

    Raises:
        ValueError: if there is no model, or neither text nor prober.
    """
    if model is not None and text is not None:
        return TextMeter(model, text, pairs)
    if model is not None and prober is not None:
        return BatchMeter(model, prober, quiet, pairs)
    missing = "no single model holds all the layers" if model is None else "nothing is measured on the training batch"
    raise ValueError(
        f"kl_budget: the distance from the base model cannot be measured: {missing}; pass model=... and "
        "retain=batches, set calibration_interval, or leave kl_budget out"
    )
