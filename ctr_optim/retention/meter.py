"""Measurement of ``KL(base || model)``, the model's distance from its base in nats per token, by forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ctr_optim.model.pair import LoRAPair
from ctr_optim.retention.passes import IDS, Batch, adapter_off, batches_of, mask_of, run, untouched
from ctr_optim.runtime import distributed
from ctr_optim.runtime.hooks import silent

TOKENS = 1024  # tokens of retained text to measure on
GRADIENT_TOKENS = 256  # tokens of retained text for one gradient; every gradient uses others
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
        parameters: A and B of all layers, each once.
    """

    on_text: ClassVar[bool]
    parameters: list[nn.Parameter]

    def measure(self) -> float:
        """Return ``KL(base || model)`` in nats per token, the same in every process.

        Raises:
            CannotMeasure: if there are no logits to compare.
        """

    def gradient(self, turn: int) -> list[Tensor] | None:
        """Return the gradient of ``KL(base || model)`` in nats per token, for each of :attr:`parameters`.

        The result is the same in every process, and at least in float32. Call :meth:`measure` first.

        Args:
            turn: number of the gradient. A meter on retained text uses other tokens at every turn: a step along the
                gradient of few tokens would change the predictions on all others.

        Returns:
            the gradient, 0 for frozen parameters; None if it cannot be computed, for example under FSDP2.
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
        self._all: list[Batch | Tensor] = []
        self._base: list[Tensor] | None = None
        self.parameters = _parameters(pairs)

    def measure(self) -> float:
        if self._base is None:
            self._all = some = batches_of(self._text(self._model), self._model, "retain")
            some = some[:: max(1, len(some) // _TEXTS)][:_TEXTS]
            self._batches = [_some_rows(batch, -(-TOKENS // len(some))) for batch in some]
            with adapter_off(self._model, self._pairs):
                self._base = [rows.log_softmax(-1).half() for rows in self._logits()]
        total = torch.stack([_summed_kl(b, here) for b, here in zip(self._base, self._logits(), strict=True)]).sum()
        count = total.new_tensor(float(sum(len(b) for b in self._base)))
        return float(distributed.mean((total, count), total))

    def gradient(self, turn: int) -> list[Tensor] | None:
        if not self._all:  # The run goes on from a checkpoint, and nothing was measured since.
            self.measure()
        count = min(len(self._all), -(-GRADIENT_TOKENS // _tokens(self._all[0])))  # batches for one gradient
        part, most = turn * count // len(self._all), GRADIENT_TOKENS // count
        batches = [self._all[(turn * count + i) % len(self._all)] for i in range(count)]

        def terms() -> Iterator[tuple[Tensor, int]]:
            for batch in (_some_rows(batch, most, part) for batch in batches):
                with adapter_off(self._model, self._pairs), untouched(self._model):
                    base = self._of(batch, _tokens(batch)).log_softmax(-1)
                with untouched(self._model), torch.enable_grad():
                    yield _summed_kl(base, self._of(batch, _tokens(batch))), len(base)

        return _gradient(self._model, self.parameters, terms)

    def release(self) -> None:
        """Do nothing: all stored tensors are needed again, since the text stays the same."""

    def _logits(self) -> list[Tensor]:
        """Return logits ``(n, V)`` for each batch, at evenly spaced tokens that are not padding."""
        with untouched(self._model):
            return [self._of(batch, TOKENS // len(self._batches)) for batch in self._batches]

    def _of(self, batch: Batch | Tensor, most: int) -> Tensor:
        """Return logits ``(n, V)`` of a batch at about ``most`` evenly spaced tokens that are not padding."""
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
        most = max(1, min(most, _BYTES // (2 * rows.shape[-1]) // len(self._batches)))
        return rows[:: max(1, -(-len(rows) // most))]  # There are no rows if all tokens are padding.


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


def _tokens(batch: Batch | Tensor) -> int:
    """Return the number of token ids in a batch, at least 1; very many if it has none."""
    ids = batch if isinstance(batch, Tensor) else batch.get(IDS)
    return max(1, ids.numel()) if isinstance(ids, Tensor) else GRADIENT_TOKENS


def _some_rows(batch: Batch | Tensor, tokens: int, part: int = 0) -> Batch | Tensor:
    """Return consecutive sequences of a batch with about ``tokens`` tokens in total.

    Args:
        batch: the batch.
        tokens: number of tokens.
        part: 0 for the first sequences, 1 for those after them, and so on; after the last ones again from the start.
    """
    ids = batch if isinstance(batch, Tensor) else batch.get(IDS)
    if not isinstance(ids, Tensor) or ids.dim() < 2:
        return batch
    size, keep = ids.shape[0], max(1, -(-tokens // max(1, ids.shape[1])))
    start = part % -(-size // keep) * keep
    rows = slice(start, start + keep)
    if isinstance(batch, Tensor):
        return batch[rows]
    return {
        key: value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value
        for key, value in batch.items()
    }


def _parameters(pairs: Sequence[LoRAPair]) -> list[nn.Parameter]:
    """Return A and B of the pairs, each once: layers may share their A."""
    return list({id(p): p for pair in pairs for p in (pair.A, pair.B)}.values())


def _gradient(
    model: nn.Module, parameters: Sequence[nn.Parameter], terms: Callable[[], Iterator[tuple[Tensor, int]]]
) -> list[Tensor] | None:
    """Return the gradient of a mean over all processes' tokens; None if a process cannot compute it.

    Args:
        model: the model; its hooks collect nothing meanwhile, and DistributedDataParallel reduces nothing.
        parameters: the parameters of the gradient. Training may freeze some of them at any time; their gradient is 0.
        terms: yields sums ``()`` over parts of this process's tokens, and the number of tokens in each.
    """
    like = distributed.local(parameters[0])
    if distributed.fsdp_modules([model]):  # Its parameters are gathered copies in a forward pass.
        return None
    found, count = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters], 0
    trained = [(p, g) for p, g in zip(parameters, found, strict=True) if p.requires_grad]
    failed = False
    with silent(), distributed.unsynchronized(model):
        try:
            for total, tokens in terms():
                grads = torch.autograd.grad(total, [p for p, _ in trained], allow_unused=True)
                reached = [(sums, g) for (_, sums), g in zip(trained, grads, strict=True) if g is not None]
                if not reached:  # Reentrant checkpointing hides the parameters from torch.autograd.grad.
                    failed = True
                    break
                for sums, g in reached:
                    sums.add_(g)
                count += tokens
        except CannotMeasure:
            raise
        except RuntimeError:  # not enough memory, or a model that has no second backward pass
            failed = True
    if not bool(distributed.everywhere(not failed, like)):
        return None
    everyone = torch.tensor(float(count), device=like.device)
    distributed.add_up([*found, everyone])
    return [g / everyone.to(g) for g in found]


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

    def logits_with_graph(self) -> Tensor:
        """Return logits ``(n, V)`` with the current parameters, to differentiate; raise an error on failure."""

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
        self._base: Tensor | None = None
        self.parameters = _parameters(pairs)

    def release(self) -> None:
        self._base = None
        self._prober.release()

    def gradient(self, turn: int) -> list[Tensor] | None:
        base = self._base
        if base is None:
            return None

        def terms() -> Iterator[tuple[Tensor, int]]:
            with self._quiet(), torch.enable_grad():
                here = self._prober.logits_with_graph()
                yield _summed_kl(base, here[self._prober.loss_tokens(here)]), len(base)

        return _gradient(self._model, self.parameters, terms)

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
        self._base = base[counts].log_softmax(-1)
        total = _summed_kl(self._base, here[counts])
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
