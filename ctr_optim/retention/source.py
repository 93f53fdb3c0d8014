"""The argument ``retain``: measured once, and stored as coordinates in the state of every A and in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.model.coordinates import SCALES, VECTORS, product
from ctr_optim.model.pair import LoRAPair
from ctr_optim.retention.metric import Metric
from ctr_optim.retention.samples import own_samples, random_tokens
from ctr_optim.retention.statistics import Retention
from ctr_optim.runtime import distributed

State = MutableMapping[Any, dict[str, Tensor]]

SOURCES: dict[str, Callable[[nn.Module], list[Tensor]]] = {
    "self": own_samples,
    "random": random_tokens,
}  # names that `retain` accepts: functions that make text from the model


class Retained:
    """The argument ``retain``, from the constructor to the first step.

    Args:
        retain: batches of text, a :class:`Retention`, the name of a source (:data:`SOURCES`), or None.

    Attributes:
        batches: the text; None without text, and before a named source has made it.
        retention: the statistics of the text; None before the measurement.
        pending: whether the measurement is still to be done.

        Raises:
            ValueError: if ``retain`` is an unknown name.
            TypeError: if ``retain`` has another type.
    """

    def __init__(self, retain: Iterable[Any] | Retention | str | None) -> None:
        self.source: str | None = None
        self.batches: list[Any] | None = None
        self.retention: Retention | None = None
        if isinstance(retain, str):
            if retain not in SOURCES:
                names = ", ".join(map(repr, SOURCES))
                raise ValueError(f"retain: got {retain!r}, expected batches of text, a Retention, or one of {names}")
            self.source = retain
        elif isinstance(retain, Retention):
            self.retention = retain
        elif isinstance(retain, Tensor):
            self.batches = [retain] if retain.dim() < 3 else list(retain)
        elif isinstance(retain, Iterable) and not isinstance(retain, (bytes, Mapping)):
            self.batches = list(retain)
        elif retain is not None:
            raise TypeError(f"retain: got a {type(retain).__name__}, expected batches of text, a Retention or a name")
        self.pending = retain is not None

    @property
    def has_text(self) -> bool:
        """Whether there is text, or a named source that makes it."""
        return self.batches is not None or self.source is not None

    def text(self, model: nn.Module) -> list[Any]:
        """Return the text; at the first call, a named source makes it from the model."""
        if self.source is not None and self.batches is None:
            self.batches = SOURCES[self.source](model)
        return self.batches or []

    def measure(self, model: nn.Module) -> Retention:
        """Return the statistics of the text on a model; only the first call measures them."""
        if self.retention is None:
            self.retention = Retention.measure(model, self.text(model))
        self.pending = False
        return self.retention

    def settle(self) -> None:
        """Cancel the measurement, because a checkpoint has provided the coordinates."""
        self.pending, self.retention = False, None

    def prepare(self, state: State, pairs: Iterable[LoRAPair]) -> None:
        """Write the coordinates to the state of every trained A that has none."""
        for pair in pairs if self.retention is not None and not self.pending else ():
            if pair.A in state and state[pair.A] and VECTORS not in state[pair.A]:
                state[pair.A].update(self._entry(pair) or {})

    @torch.no_grad()
    def start_(self, pairs: Iterable[LoRAPair], state: State) -> None:
        """Set ``A <- A P`` in every layer with ``B = 0``, which does not change the model's output; others keep A."""
        for pair in pairs:
            entry = state[pair.A] if VECTORS in state[pair.A] else self._entry(pair)
            if entry is not None:
                a = distributed.whole(pair.A.detach())
                fresh = ~(distributed.whole(pair.B.detach()) != 0).any().to(a.device)
                distributed.write_(pair.A, torch.where(fresh, product(a.to(entry[VECTORS]), entry).to(a), a))

    def _entry(self, pair: LoRAPair) -> dict[str, Tensor] | None:
        """Return the coordinates of one layer, ``(k, d)`` and ``(k + 1,)``; None if no retained text reached it.

        Raises:
            ValueError: if the measured layer had another number of input features.
        """
        assert self.retention is not None
        metric = self.retention.metric_for(pair.name)
        if metric is None:
            return None
        if metric.width != pair.A.shape[1]:
            raise ValueError(
                f"retain: {pair.name} was measured with {metric.width} input features, but here it has "
                f"{pair.A.shape[1]}; measure the retained text on this model"
            )
        return as_state(metric, pair.A)


def as_state(metric: Metric, like: Tensor) -> dict[str, Tensor]:
    """Return P as entries of the optimizer's state of A, on the device of A and at least in float32.

    Args:
        metric: P of one layer.
        like: the layer's A.
    """
    kind: dict[str, Any] = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    scales = torch.cat([metric.base.unsqueeze(-1), metric.weights], -1)
    return {VECTORS: metric.vectors.mT.contiguous().to(**kind), SCALES: scales.to(**kind)}
