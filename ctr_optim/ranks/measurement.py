"""Measure an adapter on batches: the factors of its layers, and the cost of a change of its weights.

Both run the model in eval mode, so that neither dropout nor norm statistics add noise, and leave no trace.
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
_MOST_KEPT = 2**28  # logits of the uncut adapter that stay in memory; where there are more, they are computed again


@dataclass(frozen=True)
class Factors:
    """A layer's r x r statistics over loss tokens, in float64 on the host.

    Attributes:
        H: ``A C A^T (r, r)``.
        D: ``B^T S B (r, r)``.
    """

    H: Tensor
    D: Tensor


@dataclass(frozen=True)
class Cost:
    """What a change of the weights costs, in nats per loss token.

    Attributes:
        kl: ``KL(before || after)``, the mean over loss tokens; NaN for a model whose output holds no logits.
        loss: the mean loss after the change.
    """

    kl: float
    loss: float


class Measurement:
    """Batches with a loss, run through a model.

    Args:
        model: a model with LoRA layers.
        batches: dicts for ``model(**batch)``, whose ``.loss`` is used, or tensors of token ids.
        loss_fn: ``loss_fn(model, batch)`` where ``model(**batch).loss`` is not the loss.
        who: the caller's name, for error messages.

    Raises:
        ValueError, TypeError: for batches without loss tokens, or that the model makes no loss of.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn | None, who: str) -> None:
        self.model, self.batches, self.loss_fn, self.who = model, list(batches), loss_fn, who
        if not self.batches:
            raise ValueError(f"{who}: got no batches, expected a few of the training's (64 rows serve well)")
        self.counts: list[list[Tensor]] = []  # by batch and forward: which rows of the logits the loss looks at
        self.losses: list[float] = []  # by batch, with the weights that factors() saw
        self.weights: list[float] = []  # by batch: its share in the mean over loss tokens
        self._kept: dict[int, list[Tensor]] = {}
        self.loss = math.nan

    @property
    def tokens(self) -> int:
        """Loss tokens of all batches; 0 where the model's output holds no logits."""
        return sum(int(mask.sum()) for masks in self.counts for mask in masks)

    def factors(self, pairs: Sequence[LoRAPair], max_tokens: int | None = None) -> dict[str, Factors]:
        """Return the statistics of every layer that a loss token passes.

        One forward and backward pass of every batch. H and D are exact means over loss tokens: no structure of C and S
        enters.
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
        """Return the cost of ``after``'s weights, compared with those of ``before``.

        Args:
            before, after: write the weights into the model. Those of ``after`` are in place on return.
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
        """Return ``KL(reference || model)`` of one batch, the mean over its loss tokens, with a graph for backward."""
        seen: list[Tensor] = []
        with torch.enable_grad(), self._logits(seen):
            self._loss_of(self.batches[index])
            there = [logits[mask] for logits, mask in zip(seen, self.counts[index], strict=True)]
            pairs = zip(self._kept[index], there, strict=True)
            parts = [kl_divergence(p, q, p.new_ones(len(p), dtype=torch.bool)) for p, q in pairs]
            return torch.stack([kl for kl, _ in parts]).sum() / sum(len(q) for q in there)

    @torch.no_grad()
    def keep_references(self, before: Callable[[], Any]) -> None:
        """Keep the logits of all batches with the weights that ``before`` writes, however many there are."""
        before()
        with self._quiet():
            for index, batch in enumerate(self.batches):
                if index not in self._kept:
                    self._kept[index] = self._forward(index, batch)[1]

    def part(self, indices: Sequence[int]) -> Measurement:
        """Return the measurement of some of the batches; loss and references are known already."""
        part = Measurement(self.model, [self.batches[i] for i in indices], self.loss_fn, self.who)
        part.counts = [self.counts[i] for i in indices]
        part.losses = [self.losses[i] for i in indices]
        part._kept = {new: self._kept[i] for new, i in enumerate(indices) if i in self._kept}
        part._weigh()
        return part

    @contextmanager
    def training(self, pairs: Sequence[LoRAPair]) -> Iterator[list[nn.Parameter]]:
        """Backward passes that only A and B of these layers get gradients from, without dropout."""
        with self._quiet(), _trained(self.model, pairs) as parameters:
            yield parameters

    def _weigh(self) -> None:
        """Weights of the batches, and their mean loss."""
        shares = [float(sum(int(mask.sum()) for mask in masks)) if masks else 1.0 for masks in self.counts]
        self.weights = [share / sum(shares) for share in shares]
        self.loss = math.fsum(weight * loss for weight, loss in zip(self.weights, self.losses, strict=True))

    def _reference(self, index: int, batch: Any, before: Callable[[], Any]) -> list[Tensor]:
        """The logits of loss tokens before the change; kept where all of them fit into memory."""
        if index in self._kept:
            return self._kept[index]
        before()
        _, logits = self._forward(index, batch)
        if logits and self.tokens * logits[0].shape[-1] <= _MOST_KEPT:
            self._kept[index] = logits
        return logits

    def _backward_all(self, scout: CTROptimizer) -> None:
        """Gradients of every batch, a step of no length after each; and which tokens the losses look at."""
        losses, kept, counts = [], [], []
        for batch in self.batches:
            seen: list[Tensor] = []
            with torch.enable_grad(), self._logits(seen):
                loss = self._loss_of(batch)
                masks = [_loss_rows(logits) for logits in seen]
                if not (loss.requires_grad and bool(torch.isfinite(loss))):
                    continue  # a mean over no tokens
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
                f"{self.who}: none of {len(self.batches)} batches has a loss token; expected labels other than -100"
            )
        self.batches, self.counts, self.losses = kept, counts, losses
        self._weigh()

    def _forward(self, index: int, batch: Any) -> tuple[float, list[Tensor]]:
        """The loss, and the logits ``(n, V)`` of loss tokens."""
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
        """Collect the logits of the model's forward passes."""

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
        """Eval mode for a while; no gradients are left."""
        modes = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _trained(model: nn.Module, pairs: Sequence[LoRAPair]) -> Iterator[list[nn.Parameter]]:
    """Only A and B of these layers want gradients, whatever the user froze; their own gradients come back after."""
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
    """Return a mask ``(...)`` of rows of logits ``(..., V)``; backward marks the rows that the loss depends on."""
    mask = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)

    def mark(grad: Tensor) -> None:
        mask.copy_((grad != 0).any(-1))

    if logits.requires_grad:
        logits.register_hook(mark)  # type: ignore[no-untyped-call]
    return mask
