"""Cut a trained adapter to the fewest parameters that a tolerance in nats allows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ctr_optim.ranks.adapter import Adapter, Weights, adapter_of
from ctr_optim.ranks.events import RankEvent
from ctr_optim.ranks.measurement import Cost, LossFn, Measurement
from ctr_optim.ranks.refit import halves
from ctr_optim.ranks.refit import refit as refit_
from ctr_optim.ranks.truncation import Removal, cumulative, farthest, ranks_after, removals, worthless
from ctr_optim.ranks.valuation import Existing, existing_directions
from ctr_optim.runtime.messages import users_line

_REFIT_GAIN = 3.0  # a refit was seen to lower the cost by a factor of 2 to 4: where the search begins
_REFITS = 4  # trials of the search


class Compression(list[RankEvent]):
    """One event for each layer whose rank changed, and the measured cost of the cut.

    Attributes:
        ranks: the ranks of all layers, by name; 0 for a layer that lost every direction.
        parameters_before, parameters_after: of the LoRA layers' A and B.
        loss_before, loss_after: mean loss on the batches, nats per loss token.
        kl: ``KL(before || after)`` on the batches, nats per loss token.
        tokens: loss tokens of the batches.
    """

    def __init__(
        self, events: Iterable[RankEvent], ranks: Mapping[str, int], before: Measurement, after: Cost, adapter: Adapter
    ) -> None:
        super().__init__(events)
        self.ranks = dict(ranks)
        costs = adapter.costs
        self.parameters_before = sum(len(a) * costs[name] for name, (a, _) in adapter.whole.items())
        self.parameters_after = sum(rank * costs[name] for name, rank in ranks.items())
        self.loss_before, self.loss_after, self.kl, self.tokens = before.loss, after.loss, after.kl, before.tokens

    @property
    def cost(self) -> float:
        """The measured cost in nats per loss token: the KL or the rise of the loss, whichever is larger."""
        return _cost(Cost(self.kl, self.loss_after), self.loss_before)

    @property
    def error(self) -> float:
        """The standard error of the rise of the loss on other rows, nats per loss token.

        A label drawn from the uncut model changes its log-probability with variance ``2 KL`` to second order, so the
        mean over n tokens has the standard error ``sqrt(2 KL / n)``.
        """
        return math.sqrt(2 * max(self.kl, 0.0) / self.tokens) if math.isfinite(self.kl) else 0.0


def compress(
    model: nn.Module,
    tolerance: float,
    batches: Iterable[Any] | None = None,
    *,
    adapter: str | None = None,
    multiple: int = 1,
    uniform: bool = False,
    min_rank: int = 0,
    refit: int = 0,
    loss_fn: LossFn | None = None,
) -> Compression:
    """Cut a trained adapter, in place, to the fewest parameters whose removal costs at most ``tolerance``.

    One forward and backward pass of the batches measures the factors ``H = A C A^T`` and ``D = B^T S B`` of every
    layer. They give the best approximation of every rank in the Fisher metric, and the utility of every direction.
    Directions go in the order of utility per parameter, over all layers. Forward passes find how far: the cost is
    measured on the model, not predicted.

    The cost is the rise of the loss or ``KL(uncut || cut)``, whichever is larger, as a mean over loss tokens. So the
    loss on the batches rises by at most ``tolerance``, and the predictions move by at most ``tolerance``, too, where
    a cut happens to lower the loss.

    Args:
        model: with LoRA layers of PEFT, torchtune or your own; A and B are linear maps (other layers stay as they are).
        tolerance: nats per loss token.
        batches: of the data that the adapter is for, about 2,000 loss tokens or more: dicts for ``model(**batch)``, or
            tensors of token ids. Rows that were not trained on are best.
        adapter: its name (default: the only one, or the active one).
        multiple: ranks that remain are multiples of this number (8 or 16 for kernels).
        uniform: all layers end with one rank, for programs that serve only one.
        min_rank: no layer falls below this rank (default: 0, a layer may lose its adapter).
        refit: steps in which the cut adapter learns the uncut one's predictions, so that more can go (default: 0; 24
            to 100 serve well). Half of the batches are for these steps, and the other half judges the result. The uncut
            adapter's logits of all loss tokens stay in memory.
        loss_fn: ``loss_fn(model, batch)`` where ``model(**batch).loss`` is not the loss.

    Returns:
        the events, one for each layer that changed, with the measured cost.

    A layer of rank 0 keeps one direction of zeros: libraries have no layers without rank.
    :func:`ctr_optim.export_compact` leaves such layers out. A layer that no loss token passes (an expert without
    traffic) stays as it is. Optimizers that hold the adapter are void afterwards.

    Raises:
        ValueError, TypeError: for a tolerance that is not positive, batches without loss tokens, a model without LoRA
            layers, and adapters that cannot be cut (PiSSA and other starts that change the base, merged weights).
    """
    _check(tolerance, batches, multiple, min_rank, refit)
    assert batches is not None
    layers = adapter_of(model, adapter, "compress")
    measurement = Measurement(model, batches, loss_fn, "compress")
    factors = measurement.factors(list(layers.pairs.values()))
    unseen = sorted(set(layers.pairs) - set(factors))
    if unseen:
        warnings.warn(
            f"compress: no loss token passes {len(unseen)} of {len(layers.pairs)} layers ({unseen[0]}, ...); they keep "
            "their ranks. Pass batches that reach them",
            stacklevel=users_line(),
        )
    directions = {name: existing_directions(f.H, f.D) for name, f in factors.items()}
    utilities = {name: e.utility.tolist() for name, e in directions.items()}
    cutter = _Cutter(layers, directions, removals(utilities, layers.costs, multiple, uniform, min_rank))
    try:
        result = cutter.search(measurement, tolerance)
        if refit:
            fitting, measurement = halves(measurement, lambda: layers.write(layers.whole))
            result = cutter.search_refitted(fitting, measurement, tolerance, refit, result)
    except BaseException:
        layers.resize(layers.whole)
        raise
    layers.resize(result.weights)
    ranks = cutter.ranks(result.count)
    if not any(ranks.values()):
        warnings.warn(
            f"compress: without the adapter the cost is at most the tolerance of {tolerance:g} nats per token, so that "
            "no direction is left. Pass a smaller tolerance",
            stacklevel=users_line(),
        )
    events = []
    for name in sorted(ranks):
        before = len(layers.whole[name][0])
        if ranks[name] != before and not layers.empty(name):
            worth = result.coupling * utilities[name][ranks[name] - 1] if ranks[name] else 0.0
            per_million = 1e6 * worth / layers.costs[name]
            events.append(RankEvent(0, name, before, ranks[name], ranks[name], per_million, "shrink"))
    done = Compression(events, ranks, measurement, result.cost, layers)
    if done.error > tolerance:
        enough = math.ceil(done.tokens * (done.error / tolerance) ** 2)
        warnings.warn(
            f"compress: {done.tokens} loss tokens show the rise of the loss only to {done.error:.2g} nats per token, "
            f"more than the tolerance of {tolerance:g}; the KL holds, the loss on other rows may rise further. Pass "
            f"batches with about {enough} loss tokens, or a larger tolerance",
            stacklevel=users_line(),
        )
    return done


@dataclass(frozen=True)
class _Result:
    """A cut: how many removals, the weights after them, their measured cost, and that over the predicted cost."""

    count: int
    weights: Weights
    cost: Cost
    coupling: float


class _Cutter:
    """An adapter, its directions, and the order in which they go."""

    def __init__(self, layers: Adapter, directions: Mapping[str, Existing], order: Sequence[Removal]) -> None:
        self.layers, self.directions, self.order, self.predicted = layers, directions, order, cumulative(order)

    def ranks(self, count: int) -> dict[str, int]:
        """Ranks after some removals."""
        return ranks_after(self.order, count, {name: len(a) for name, (a, _) in self.layers.whole.items()})

    def weights(self, count: int) -> Weights:
        """Weights after some removals."""
        return self.layers.cut(self.directions, self.ranks(count))

    def search(self, measurement: Measurement, tolerance: float) -> _Result:
        """The farthest cut within the tolerance. The weights that the model holds afterwards are any."""
        layers, found = self.layers, dict[int, Cost]()

        def measured(count: int) -> float:
            cut = self.weights(count)
            found[count] = measurement.cost(lambda: layers.write(layers.whole), lambda: layers.write(cut))
            return _cost(found[count], measurement.loss)

        count, cost = farthest(self.predicted, measured, tolerance, start=worthless(self.order))
        coupling = cost / self.predicted[count] if self.predicted[count] > 0 else 1.0
        return _Result(count, self.weights(count), found.get(count, Cost(0.0, measurement.loss)), coupling)

    def search_refitted(
        self, fitting: Measurement, judging: Measurement, tolerance: float, steps: int, start: _Result
    ) -> _Result:
        """The farthest cut whose refitted weights stay within the tolerance; ``start`` is the one without a refit.

        Args:
            fitting: batches for the steps.
            judging: batches that the cost is measured on.
        """
        layers, found = self.layers, dict[int, tuple[Weights, Cost]]()

        def measured(count: int) -> float:
            layers.resize(self.weights(count))
            found[count] = refit_(layers, fitting, steps, tolerance), judging.cost(_nothing, _nothing)
            return _cost(found[count][1], judging.loss)

        guess = start.coupling / _REFIT_GAIN
        count, _ = farthest(self.predicted, measured, tolerance, start.count, guess, close=0.85, passes=_REFITS)
        if count not in found:
            layers.resize(start.weights)
            found[count] = start.weights, judging.cost(_nothing, _nothing)
        return _Result(count, *found[count], start.coupling)


def _nothing() -> None:
    """The weights are in place, and so are the references."""


def _cost(cost: Cost, loss_before: float) -> float:
    """The larger of the KL and the rise of the loss; a cost that is not finite counts as infinite."""
    kl = cost.kl if not math.isnan(cost.kl) else 0.0
    largest = max(kl, cost.loss - loss_before)
    return largest if math.isfinite(largest) else math.inf


def _check(tolerance: Any, batches: Any, multiple: Any, min_rank: Any, refit: Any) -> None:
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance: got {tolerance!r}, expected a number of nats per token, such as 0.01")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance: got {tolerance!r}, expected a positive number of nats per token, such as 0.01")
    for name, value, least in (("multiple", multiple, 1), ("min_rank", min_rank, 0), ("refit", refit, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {least}")
    if batches is None:
        raise ValueError(
            "batches: got None, expected a few batches of the adapter's data; weights alone do not tell how many nats "
            "a direction is worth"
        )
