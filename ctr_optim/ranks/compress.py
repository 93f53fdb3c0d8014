"""Cut a trained adapter to the fewest parameters within a tolerance in nats."""

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

_REFIT_GAIN = 3.0  # first guess of the factor by which a refit lowers the cost; factors of 2 to 4 were measured
_REFITS = 4  # trials of the search, each of which runs all refit steps


class Compression(list[RankEvent]):
    """One event for each layer whose rank changed, and the measured cost of the cut.

    Attributes:
        ranks: rank of every layer, by name; 0 for a layer that lost every direction.
        parameters_before, parameters_after: number of parameters in A and B of the LoRA layers.
        loss_before, loss_after: mean loss on the batches, in nats per loss token.
        kl: ``KL(before || after)`` on the batches, in nats per loss token; NaN if the model's output has no logits.
        tokens: number of loss tokens in the batches; 0 if the model's output has no logits.
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
        """Measured cost in nats per loss token: the larger of the KL and the increase of the loss."""
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

    One forward and backward pass over the batches measures the factors ``H = A C A^T`` and ``D = B^T S B`` of every
    layer. They give the best approximation of every rank in the Fisher metric, and the utility of every direction.
    Directions are removed in the order of utility per parameter, over all layers. Forward passes measure the cost of a
    cut on the model, and a search finds the largest cut within the tolerance.

    The cost is the larger of the increase of the loss and ``KL(uncut || cut)``, both as means over loss tokens. So the
    loss on the batches rises by at most ``tolerance``. The KL limits the change even if a cut lowers the loss.

    Args:
        model: a model with LoRA layers of PEFT, of torchtune or of your own. Layers whose A and B are not linear maps
            stay unchanged.
        tolerance: largest cost, in nats per loss token.
        batches: data of the adapter's task, about 2,000 loss tokens or more: dicts for ``model(**batch)``, or tensors
            of token ids. Rows that were not trained on are best.
        adapter: the adapter's name (default: the only adapter, or the active one).
        multiple: remaining ranks are multiples of this number (8 or 16 for fast kernels).
        uniform: whether all layers get one rank, for servers that support only one.
        min_rank: smallest rank of a layer (default: 0, a layer may lose its adapter).
        refit: number of optimizer steps in which the cut adapter learns the uncut adapter's predictions (default: 0;
            24 to 100 work well). More directions can then be removed. Half of the batches are for these steps; the
            other half measures the cost. The uncut adapter's logits of all loss tokens stay in memory.
        loss_fn: called as ``loss_fn(model, batch)`` if ``model(**batch).loss`` is not the loss.

    Returns:
        One event for each layer whose rank changed, with the measured cost.

    A layer of rank 0 keeps one direction of zeros, because LoRA libraries have no layers of rank 0.
    :func:`ctr_optim.export_compact` leaves such layers out. A layer that no loss token passes (such as an unused
    expert) stays unchanged. Do not use an optimizer of the adapter's parameters after the call.

    Raises:
        TypeError: the tolerance is not a number, or a batch has an unknown type.
        ValueError: an argument is out of range, the batches have no loss tokens, the model has no LoRA layers, or the
            adapter cannot be cut. Adapters with merged weights, and initializations such as PiSSA that change the base
            weights, cannot be cut.
    """
    _check(tolerance, batches, multiple, min_rank, refit)
    assert batches is not None
    layers = adapter_of(model, adapter, "compress")
    measurement = Measurement(model, batches, loss_fn, "compress")
    factors = measurement.factors(list(layers.pairs.values()))
    unseen = sorted(set(layers.pairs) - set(factors))
    if unseen:
        warnings.warn(
            f"compress: no loss token passes {len(unseen)} of {len(layers.pairs)} layers ({unseen[0]}, ...). These "
            "layers keep their ranks. To cut them, pass batches whose tokens reach them",
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
            f"compress: removing the whole adapter costs at most the tolerance of {tolerance:g} nats per token, so no "
            "direction is left. Pass a smaller tolerance",
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
    """One cut of the adapter.

    Attributes:
        count: number of removals.
        weights: weights after the removals.
        cost: measured cost of the cut.
        coupling: measured over predicted cost.
    """

    count: int
    weights: Weights
    cost: Cost
    coupling: float


class _Cutter:
    """An adapter, its directions, and the order of their removal."""

    def __init__(self, layers: Adapter, directions: Mapping[str, Existing], order: Sequence[Removal]) -> None:
        self.layers, self.directions, self.order, self.predicted = layers, directions, order, cumulative(order)

    def ranks(self, count: int) -> dict[str, int]:
        """Return the ranks after the first ``count`` removals."""
        return ranks_after(self.order, count, {name: len(a) for name, (a, _) in self.layers.whole.items()})

    def weights(self, count: int) -> Weights:
        """Return the weights after the first ``count`` removals."""
        return self.layers.cut(self.directions, self.ranks(count))

    def search(self, measurement: Measurement, tolerance: float) -> _Result:
        """Return the largest cut within the tolerance. The model's weights are those of the last trial afterwards."""
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
        """Return the largest cut whose refitted weights stay within the tolerance.

        Args:
            fitting: batches for the refit steps.
            judging: batches on which the cost is measured.
            tolerance: largest cost, in nats per loss token.
            steps: number of refit steps in each trial.
            start: the largest cut without a refit, at which the search starts.
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
    """Do nothing: the weights are in the model already, and the reference logits are stored."""


def _cost(cost: Cost, loss_before: float) -> float:
    """Return the larger of the KL and the increase of the loss; infinity if it is not finite."""
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
            "batches: got None, expected a few batches of the adapter's task; without data the cost of a cut cannot be "
            "measured"
        )
