"""The held-out rows, and the model's loss on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.retention.passes import IDS, device_of, run, untouched
from ctr_optim.settings import IGNORED

Loss = Callable[[nn.Module, Any], Tensor]


class Holdout:
    """Rows that training never uses, and the steps at which the optimizer measures the loss on them.

    Args:
        batches: dicts for ``model(**batch)``, or tensors of token ids ``(B, T)``. Three batches of the training's size,
            measured every 100 steps, cost 1 % of the training. Every process has its own batches, and all processes
            have the same number.
        loss: ``loss(model, batch)`` returns the mean loss of a batch; None: the model's own loss, for the batch's
            ``labels`` or else for the next token.
        every: largest number of steps between measurements, which start at steps 8, 12, 18, 27, ...
        shrink: factor of the bound after a measurement that is not the lowest, between 0 and 1.
        rollback: whether to restore the best weights then.

    Raises:
        TypeError, ValueError: if an argument is invalid; names it, the given and the expected value.

    Example::

        opt = CTROptimizer(model.parameters(), holdout=[batch for batch, _ in zip(eval_loader, range(3))])
        ...
        opt.restore_best()
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        loss: Loss | None = None,
        every: int = 100,
        shrink: float = 0.3,
        rollback: bool = True,
    ) -> None:
        if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
            raise TypeError(
                f"holdout: got a {type(batches).__name__}; expected a few batches that are never trained on: dicts for "
                "model(**batch) with labels, or tensors of token ids"
            )
        self.batches = [batches] if isinstance(batches, Tensor) and batches.dim() < 3 else list(batches)
        if not self.batches:
            raise ValueError("holdout: got no batches; expected a few that are never trained on")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"holdout: every is {every!r}, expected a whole number of steps of at least 1")
        if not 0 < shrink < 1:
            raise ValueError(f"holdout: shrink is {shrink!r}, expected a number between 0 and 1")
        self.loss, self.every, self.shrink, self.rollback = loss, every, float(shrink), bool(rollback)

    @classmethod
    def of(cls, given: Iterable[Any] | Holdout | None) -> Holdout | None:
        """Return batches as a hold-out with default options; a hold-out and None unchanged."""
        return given if given is None or isinstance(given, Holdout) else cls(given)

    def due(self, step: int) -> bool:
        """Return whether to measure after ``step`` steps: 8, 12, 18, 27, ..., until the gap is ``every``."""
        look = min(8, self.every)
        while look < step:
            look += max(1, min(look // 2, self.every))
        return look == step

    def sums(self, model: nn.Module) -> Tensor:
        """Return ``(2,)`` the loss summed over the tokens of all batches, and their number; do not change the model.

        With a ``loss`` function, or without integer labels, every batch counts as one token.

        Raises:
            TypeError: if a batch is neither a dict nor a tensor.
            ValueError: if the model returns no loss for a batch.
        """
        totals = []
        with untouched(model):
            for index, batch in enumerate(self.batches):
                loss, count = self._mean(model, batch, index)
                totals.append(torch.stack([loss.detach().double().mean() * count, loss.new_tensor(count).double()]))
        return torch.stack(totals).sum(0)

    def _mean(self, model: nn.Module, batch: Any, index: int) -> tuple[Tensor, float]:
        """Return the mean loss of a batch, and its number of tokens."""
        placed = _moved(batch, device_of(model))
        if self.loss is not None:
            return self.loss(model, placed), 1.0
        if isinstance(placed, Tensor):
            placed = {IDS: placed if placed.dim() > 1 else placed.unsqueeze(0)}
        if not isinstance(placed, Mapping):
            raise TypeError(
                f"holdout: batch {index} is a {type(batch).__name__}; expected a dict for model(**batch); or pass "
                "Holdout(batches, loss=lambda model, batch: ...)"
            )
        if "labels" not in placed and isinstance(placed.get(IDS), Tensor):
            mask = placed.get("attention_mask")
            labels = placed[IDS] if mask is None else placed[IDS].masked_fill(mask == 0, IGNORED)
            placed = {**placed, "labels": labels}
        output = run(model, dict(placed))
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"holdout: the model gives no loss for batch {index} (its output is a {type(output).__name__}); add "
                "labels to the batch, or pass Holdout(batches, loss=lambda model, batch: ...)"
            )
        labels = placed.get("labels")
        known = isinstance(labels, Tensor) and not labels.is_floating_point()
        return loss, float((labels != IGNORED).sum()) if known else 1.0


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch
