"""Measure an adapter on batches: the factors of its layers, and the cost of a change of its weights.

Both measurements run the model in eval mode, so that dropout and batch statistics add no noise. They restore training
modes, gradients and ``requires_grad`` afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.model.pair import LoRAPair
from ctr_optim.optimizer import CTROptimizer
from ctr_optim.ranks.valuation import host
from ctr_optim.trust_region.logits import kl_divergence, logits_of

LossFn = Callable[[nn.Module, Any], Tensor]
_MOST_KEPT = 2**28  # most reference logits (numbers) that stay in memory; more are computed again for each trial


@dataclass(frozen=True)
class Factors:
    """A layer's r x r statistics over loss tokens, in float64 on the CPU.

    Attributes:
        H: ``A C A^T (r, r)``.
        D: ``B^T S B (r, r)``.
    """

    H: Tensor
    D: Tensor


@dataclass(frozen=True)
class Cost:
    """Cost of a change of the weights, in nats per loss token.

    Attributes:
        kl: ``KL(before || after)``, the mean over loss tokens; NaN for a model whose output has no logits.
        loss: the mean loss after the change.
    """

    kl: float
    loss: float


class Measurement:
    """A model with batches that measure its loss and the KL of its predictions.

    Call :meth:`factors` first: it drops batches without loss tokens, and finds the loss tokens of the others.

    Args:
        model: a model with LoRA layers.
        batches: dicts for ``model(**batch)``, whose ``.loss`` is used, or tensors of token ids.
        loss_fn: called as ``loss_fn(model, batch)`` if ``model(**batch).loss`` is not the loss.
        who: the caller's name, for error messages.

    Raises:
        ValueError: there are no batches.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn | None, who: str) -> None:
        self.model, self.batches, self.loss_fn, self.who = model, list(batches), loss_fn, who
        if not self.batches:
            raise ValueError(f"{who}: got no batches, expected a few of the adapter's task (64 rows work well)")
        self.counts: list[list[Tensor]] = []  # by batch and chunk of logits: mask of the loss tokens
        self.losses: list[float] = []  # by batch: the loss, with the weights at the call of factors()
        self.weights: list[float] = []  # by batch: its share of the mean over loss tokens
        self._kept: dict[int, list[Tensor]] = {}
        self.loss = math.nan

    @property
    def tokens(self) -> int:
        """Number of loss tokens in all batches; 0 if the model's output has no logits."""
        return sum(int(mask.sum()) for masks in self.counts for mask in masks)

    def factors(self, pairs: Sequence[LoRAPair], max_tokens: int | None = None) -> dict[str, Factors]:
        """Return the statistics of every layer that a loss token passes, by layer name.

        Each batch runs forward and backward once. H and D are means over loss tokens, and do not depend on the
        structure of C and S.

        Args:
            pairs: layers to measure.
            max_tokens: most tokens that a layer uses in one forward pass; None for all.

        Raises:
            ValueError, TypeError: no batch has a loss token, or the model returns no loss for a batch.
        """
        with self.training(pairs) as parameters:
            scout = CTROptimizer(
                parameters, lr=0.0, model=self.model, max_kl=None, calibration_interval=None, factor_interval=1,
                factor_decay=0.9999, max_tokens=max_tokens,
            )  # fmt: skip
            try:
                self._backward_all(scout)
                found = {}
                for block in scout.blocks:
                    seen = block.b.tensors["factor_updates"] > 0
                    for i, pair in enumerate(block.pairs):
                        if bool(seen[i]):
                            found[pair.name] = Factors(host(block.H[i]), host(block.D[i]))
                return found
            finally:
                scout.zero_grad()
                scout.close()

    @torch.no_grad()
    def cost(self, before: Callable[[], Any], after: Callable[[], Any]) -> Cost:
        """Return the cost of the weights written by ``after``, compared with the weights written by ``before``.

        Args:
            before, after: functions that write weights into the model. On return, the model has the weights of
                ``after``.
        """
        kl = loss = 0.0
        tokens = self.tokens
        with self._quiet():
            for index, batch in enumerate(self.batches):
                here = self._reference(index, batch, before)
                after()
                mean, there = self._forward(index, batch)
                loss += self.weights[index] * mean
                for p, q in zip(here, there, strict=True):
                    kl += float(kl_divergence(p, q, p.new_ones(len(p), dtype=torch.bool))[0]) / tokens
        return Cost(kl if tokens else math.nan, loss)

    def divergence(self, index: int) -> Tensor:
        """Return ``KL(reference || model)`` of batch ``index``: ``()``, mean over loss tokens, differentiable.

        Needs the batch's reference logits (:meth:`keep_references`).
        """
        seen: list[Tensor] = []
        with torch.enable_grad(), self._logits(seen):
            self._loss_of(self.batches[index])
            there = [logits[mask] for logits, mask in zip(seen, self.counts[index], strict=True)]
            pairs = zip(self._kept[index], there, strict=True)
            parts = [kl_divergence(p, q, p.new_ones(len(p), dtype=torch.bool)) for p, q in pairs]
            return torch.stack([kl for kl, _ in parts]).sum() / sum(len(q) for q in there)

    @torch.no_grad()
    def keep_references(self, before: Callable[[], Any]) -> None:
        """Store the logits of all batches for the weights that ``before`` writes, without a limit of memory."""
        before()
        with self._quiet():
            for index, batch in enumerate(self.batches):
                if index not in self._kept:
                    self._kept[index] = self._forward(index, batch)[1]

    def part(self, indices: Sequence[int]) -> Measurement:
        """Return a measurement of some of the batches, with their known losses, loss tokens and references."""
        part = Measurement(self.model, [self.batches[i] for i in indices], self.loss_fn, self.who)
        part.counts = [self.counts[i] for i in indices]
        part.losses = [self.losses[i] for i in indices]
        part._kept = {new: self._kept[i] for new, i in enumerate(indices) if i in self._kept}
        part._weigh()
        return part

    @contextmanager
    def training(self, pairs: Sequence[LoRAPair]) -> Iterator[list[nn.Parameter]]:
        """Set eval mode, and let only A and B of these layers require gradients; yield these parameters."""
        with self._quiet(), _trained(self.model, pairs) as parameters:
            yield parameters

    def _weigh(self) -> None:
        """Compute each batch's share of the loss tokens, and the mean loss."""
        shares = [float(sum(int(mask.sum()) for mask in masks)) if masks else 1.0 for masks in self.counts]
        self.weights = [share / sum(shares) for share in shares]
        self.loss = math.fsum(weight * loss for weight, loss in zip(self.weights, self.losses, strict=True))

    def _reference(self, index: int, batch: Any, before: Callable[[], Any]) -> list[Tensor]:
        """Return the logits ``(n, V)`` of a batch's loss tokens before the change; store them if all batches fit."""
        if index in self._kept:
            return self._kept[index]
        before()
        _, logits = self._forward(index, batch)
        if logits and self.tokens * logits[0].shape[-1] <= _MOST_KEPT:
            self._kept[index] = logits
        return logits

    def _backward_all(self, scout: CTROptimizer) -> None:
        """Run every batch forward and backward with a step of lr=0, and record losses and loss tokens."""
        losses, kept, counts = [], [], []
        for batch in self.batches:
            seen: list[Tensor] = []
            with torch.enable_grad(), self._logits(seen):
                loss = self._loss_of(batch)
                masks = [_loss_rows(logits) for logits in seen]
                if not (loss.requires_grad and bool(torch.isfinite(loss))):
                    continue  # a batch without loss tokens: its mean loss is NaN, or has no graph
                loss.backward()  # type: ignore[no-untyped-call]
            tokens = sum(int(mask.sum()) for mask in masks) if masks else 1
            if tokens:
                scout.step()
                losses.append(float(loss.detach()))
                kept.append(batch)
                counts.append(masks)
            scout.zero_grad()
        if not kept:
            raise ValueError(
                f"{self.who}: none of {len(self.batches)} batches has a loss token; pass batches with labels other "
                "than -100"
            )
        self.batches, self.counts, self.losses = kept, counts, losses
        self._weigh()

    def _forward(self, index: int, batch: Any) -> tuple[float, list[Tensor]]:
        """Return a batch's loss, and the logits ``(n, V)`` of its loss tokens, one tensor for each chunk."""
        seen: list[Tensor] = []
        with self._logits(seen):
            loss = float(self._loss_of(batch))
        return loss, [logits[mask] for logits, mask in zip(seen, self.counts[index], strict=True)]

    def _loss_of(self, batch: Any) -> Tensor:
        if self.loss_fn is not None:
            return self.loss_fn(self.model, batch)
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch, "labels": batch}
        if not isinstance(batch, Mapping):
            raise TypeError(f"{self.who}: a batch is a {type(batch).__name__}; pass dicts, token ids, or loss_fn=...")
        loss = getattr(self.model(**batch), "loss", None)
        if loss is None:
            raise ValueError(f"{self.who}: the model gave no loss; expected batches with labels, or loss_fn=...")
        return loss  # type: ignore[no-any-return]

    @contextmanager
    def _logits(self, seen: list[Tensor]) -> Iterator[None]:
        """Append the logits of the model's forward passes to ``seen``."""

        def look(module: nn.Module, args: Any, output: Any) -> None:
            if (logits := logits_of(output)) is not None:
                seen.extend(logits.chunks)

        handle = self.model.register_forward_hook(look)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Set eval mode, and restore the modes of all modules afterwards."""
        modes = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _trained(model: nn.Module, pairs: Sequence[LoRAPair]) -> Iterator[list[nn.Parameter]]:
    """Let only A and B of these layers require gradients; restore ``requires_grad`` and gradients afterwards."""
    parameters = [p for pair in pairs for p in (pair.A, pair.B)]
    before = [(p, p.requires_grad, p.grad) for p in {*model.parameters(), *parameters}]
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
            p.grad = None
        yield parameters
    finally:
        for p, required, grad in before:
            p.requires_grad_(required)
            p.grad = grad


def _loss_rows(logits: Tensor) -> Tensor:
    """Return a mask ``(...)`` for logits ``(..., V)``. The backward pass marks the tokens with a nonzero gradient."""
    mask = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)

    def mark(grad: Tensor) -> None:
        mask.copy_((grad != 0).any(-1))

    if logits.requires_grad:
        logits.register_hook(mark)  # type: ignore[no-untyped-call]
    return mask
