"""A bound on the model's total distance from its base: ``KL(base || model) <= kl_budget``, in nats per token.

Near the base model, this KL is quadratic in the displacement of the weights. Its square root is therefore a distance,
and one step adds at most the step's own length. The length of a step is the square root of its KL bound, or without a
bound, of its predicted KL. The path is the sum of these lengths. ``rate`` is the distance on the measured tokens per
unit of path; every measurement updates it.

- Between measurements, the distance is predicted to grow by ``rate`` times the path.
- A measurement follows once this product reaches half of the remaining distance. Measurements therefore become more
  frequent as the budget fills.
- A step is shortened if it is longer than the remaining distance and also longer than ``_STRIDE`` of the total.
- If a measurement exceeds the budget, every B shrinks until the KL is within the budget. The KL is quadratic in B.

Once a measurement finds most of the budget used, the gradient g of the KL is computed as well, and steps lose the
component along g that would leave the budget (:mod:`ctr_optim.retention.boundary`). The KL then grows by the sum of
``<g, step>`` and by a surplus: curvature, and the error of a gradient from few tokens. ``span`` is the path over which
the surplus reaches ``_SURPLUS`` of the budget; every measurement updates it. A step is at most ``1 / _STEPS`` of the
span, and a measurement with a new gradient follows at its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctr_optim.model.pair import LoRAPair
from ctr_optim.retention import boundary
from ctr_optim.retention.boundary import S, State
from ctr_optim.retention.meter import CannotMeasure, Meter
from ctr_optim.runtime import distributed

TOLERANCE = 0.02  # relative excess over the budget that is allowed at the start
_INTERVAL = 50  # largest number of steps between measurements
_STRIDE = 0.3  # share of the total distance that every step may use; without it, training would stop at the boundary
_FINEST = 0.01  # share of the total distance; a shorter path needs no measurement
_LEAST_RATE, _MEMORY = 0.05, 0.7  # smallest `rate`, and smallest ratio of a new `rate` to the old one
_TRIES = 8  # largest number of attempts to shrink
_PLAIN = 1.1  # up to this excess, the KL after shrinking follows from the KL before, without a measurement

# With a gradient. Shares are of the budget.
_NEAR = 0.5  # share in use from which gradients are computed; below 0.8 of it, they are dropped
_LATEST = 16  # largest number of steps between measurements
_NEWEST = 0.5  # weight of a new gradient in the average of gradients, each of which is from other tokens
_FIRST = 4  # number of gradients in the first average
_SURPLUS = 0.125  # share by which the KL may grow between two measurements beyond the prediction of the gradient
_STEPS = 2  # smallest number of steps from one measurement to the next
_ERROR = 0.3  # usual error of the predicted surplus, relative to it
_CHANGE = 0.2, 1.4  # smallest and largest factor of the span in one measurement


@dataclass(slots=True)
class BudgetState:
    """Numbers of a budget that checkpoints contain.

    Attributes:
        budget_used: last measured KL from the base model, in nats per token; None before the first measurement.
        budget_rate: distance on the measured tokens per unit of path.
        budget_path: sum of the steps' lengths since the last measurement.
        budget_age: steps since the last measurement.
        budget_ahead: last measured KL plus the first-order changes of the steps since then.
        budget_span: path over which the KL grows by ``_SURPLUS`` of the budget beyond its first-order change; None
            while no gradient is in use.
        budget_turn: number of gradients computed so far.
        budget_length: length of the last step with a bound, before it was shortened; None without such a step.
    """

    budget_used: float | None = None
    budget_rate: float = 1.0
    budget_path: float = 0.0
    budget_age: int = 0
    budget_ahead: float = 0.0
    budget_span: float | None = None
    budget_turn: int = 0
    budget_length: float | None = None


class Budget:
    """Keeps ``KL(base || model)`` below a limit.

    Args:
        limit: the limit, in nats per token.
        meter: measures the KL.
        pairs: the LoRA layers.
    """

    def __init__(self, limit: float, meter: Meter, pairs: Sequence[LoRAPair]) -> None:
        self.limit, self.meter, self.pairs = limit, meter, list(pairs)
        self.state = BudgetState()
        self._differentiable = True  # False once a gradient could not be computed
        self._growth: Tensor | None = None  # first-order change of the KL along the current step, before its scale

    @property
    def reach(self) -> float:
        """The allowed distance from the base model: the square root of the limit."""
        return math.sqrt(self.limit)

    @property
    def left(self) -> float:
        """The remaining distance within the budget, predicted from the last measurement and the path; at least 0."""
        used = math.sqrt(max(self.state.budget_used or 0.0, 0.0))
        return max(self.reach - used - self.state.budget_rate * self.state.budget_path, 0.0)

    def metrics(self) -> dict[str, float | None]:
        """Return the last measurement and the limit; ``retain/kl`` only if retained text was measured."""
        used = {"budget/used": self.state.budget_used, "budget/limit": self.limit}
        return {"retain/kl": self.state.budget_used, **used} if self.meter.on_text else used

    def due(self, length: float) -> bool:
        """Return whether to measure after a step of this length."""
        s = self.state
        if s.budget_used is None or s.budget_age + 1 >= _INTERVAL:
            return True
        if s.budget_span is not None:
            # The small margin is for rounding: a sum of _STEPS equal steps must reach the span.
            return s.budget_age + 1 >= _LATEST or s.budget_path + length * self.factor(length) >= 0.99 * s.budget_span
        least = _FINEST * self.reach
        used = math.sqrt(max(s.budget_used, 0.0))
        return s.budget_rate * (s.budget_path + length) >= max(0.5 * (self.reach - used), least)

    def begin(self) -> None:
        """Measure once before the first step.

        Raises:
            CannotMeasure: if the KL cannot be measured.
            ValueError: if the KL already exceeds the budget.
        """
        if self.state.budget_used is not None:
            return
        used = self._measured()
        if used > self.limit * (1 + TOLERANCE):
            raise ValueError(
                f"kl_budget: the model is already {used:.4g} nats per token from its base model (B = 0), more than "
                f"kl_budget={self.limit:g}; start from a fresh adapter (B = 0; not PiSSA or OLoRA), or raise kl_budget"
            )
        self.state.budget_used = used

    def doubt(self) -> None:
        """Make the next step measure, because something else has replaced the weights."""
        self.state.budget_age, self.state.budget_span = _INTERVAL, None

    def forget(self, state: State) -> None:
        """Drop the gradient from the optimizer's state, because the parameters have other shapes or directions."""
        self.state.budget_span = None
        boundary.forget(state)

    def along(
        self, deltas: Mapping[S, Tensor], scale: Tensor, length: float, finite: Tensor, state: State
    ) -> dict[S, Tensor] | None:
        """Return a step that keeps the predicted KL within the budget; None if no gradient is in use.

        Args:
            deltas: the step before its scale, ``(L, *shape)`` for each stack.
            scale: ``()`` expected factor of the step.
            length: length of the step.
            finite: ``()`` whether all gradients of the loss are finite.
            state: the optimizer's state, which holds the gradient of the KL.
        """
        s, self._growth = self.state, None
        gradients = None if s.budget_span is None else boundary.stacked(deltas, state)
        if gradients is None:
            s.budget_span = None
            return None
        factor = self.factor(length)
        room = self.limit - s.budget_ahead - (1 + _ERROR) * self._surplus(s.budget_path + factor * length)
        tiny = torch.finfo(scale.dtype).tiny
        found, self._growth = boundary.projected(deltas, gradients, room / (factor * scale).clamp_min(tiny), finite)
        return found

    def _surplus(self, path: float) -> float:
        """Return the predicted growth of the KL beyond its first-order change over a path, in nats per token."""
        assert self.state.budget_span is not None
        return _SURPLUS * self.limit * path / self.state.budget_span

    def factor(self, length: float) -> float:
        """Return the factor in (0, 1] by which to shorten a step of this length."""
        if self.state.budget_span is not None:
            return min(1.0, self.state.budget_span / (_STEPS * length)) if length > 0 else 1.0
        distance = self.state.budget_rate * length
        most = max(self.left, _STRIDE * self.reach)
        return min(1.0, most / distance) if distance > 0 else 1.0

    def moved(self, length: float, factor: float, scale: Tensor, measure: bool, state: State) -> None:
        """Count a step; if ``measure``, measure the KL and shrink the adapter if the KL exceeds the budget.

        Args:
            length: length of the step before :meth:`factor`.
            factor: the result of :meth:`factor`.
            scale: ``()`` factor of the whole step.
            measure: whether to measure.
            state: the optimizer's state, which holds the gradient of the KL.

        Raises:
            CannotMeasure: if the KL cannot be measured.
        """
        s = self.state
        s.budget_path, s.budget_age = s.budget_path + factor * length, s.budget_age + 1
        s.budget_length = length
        if self._growth is not None:
            s.budget_ahead = max(s.budget_ahead + float(self._growth * scale), 0.0)
        if measure:
            self._learn(self._measured())
            self._differentiate(factor * length, state)
        self.meter.release()

    def _learn(self, used: float) -> None:
        """Update the state with a measurement, and shrink the adapter if the measurement exceeds the budget."""
        s, allowed = self.state, self.limit
        if s.budget_span is not None:
            allowed *= 1 + TOLERANCE  # Later steps go back; shrinking would undo more of the training.
            s.budget_span *= self._change(used - s.budget_ahead)
        elif s.budget_path > 0:
            gone = abs(math.sqrt(max(used, 0.0)) - math.sqrt(max(s.budget_used or 0.0, 0.0)))
            s.budget_rate = max(gone / s.budget_path, _MEMORY * s.budget_rate, _LEAST_RATE)
        s.budget_used = s.budget_ahead = self._within(used) if used > allowed else used
        s.budget_path, s.budget_age = 0.0, 0

    def _change(self, surplus: float) -> float:
        """Return the factor of the span, given the measured growth of the KL beyond its first-order change.

        The surplus of equal steps is between linear and quadratic in the path. The span shrinks as for a linear, and
        grows as for a quadratic one.
        """
        expected = self._surplus(self.state.budget_path)
        if expected <= 0:
            return 1.0
        least, most = _CHANGE
        ratio = expected / surplus if surplus > 0 else math.inf
        if not self.meter.on_text:  # The KL differs from batch to batch, so that a single measurement says little.
            return math.sqrt(min(max(ratio, least), most))
        return min(ratio if ratio < 1 else ratio**0.5, most) if ratio > least else least

    def _differentiate(self, length: float, state: State) -> None:
        """Update the gradient of the KL after a measurement; start or end its use as the budget fills or empties."""
        s, used = self.state, self.state.budget_used or 0.0
        started = s.budget_span is None
        if not self._differentiable or used < _NEAR * self.limit * (1.0 if started else 0.8):
            if not started:
                self.forget(state)
            return
        for index in range(_FIRST if started and self.meter.on_text else 1):
            found = self.meter.gradient(s.budget_turn)
            weight = 1 / (1 + index) if started else _NEWEST
            named = None if found is None else dict(zip(self.meter.parameters, found, strict=True))
            if named is None or not boundary.store(named, state, weight):
                self._differentiable = False
                self.forget(state)
                return
            s.budget_turn += 1
        if started:  # Guess a curvature like that along the path so far.
            curvature = s.budget_rate**2 * length
            s.budget_span = _SURPLUS * self.limit / curvature if curvature > 0 else length

    @torch.no_grad()
    def _within(self, used: float) -> float:
        """Shrink every B until the KL is within the budget, and return that KL.

        After a small excess, the KL is computed from its value before.
        """
        weights = [distributed.local(pair.B.detach()) for pair in self.pairs]
        full, share = [weight.clone() for weight in weights], 1.0
        for _ in range(_TRIES):
            # The KL is quadratic in B. Aim slightly below the limit, so that one attempt usually suffices.
            share *= math.sqrt(self.limit * (1 - TOLERANCE / 2) / used)
            torch._foreach_copy_(weights, torch._foreach_mul(full, share))
            if used <= _PLAIN * self.limit:
                return self.limit * (1 - TOLERANCE / 2)
            used = self._measured()
            if used <= self.limit:
                break
        return used

    def _measured(self) -> float:
        used = self.meter.measure()
        if not math.isfinite(used):
            raise CannotMeasure(
                "kl_budget: the model's predictions are not finite, so its distance from the base model cannot be "
                "measured; check whether the model overflows in half precision"
            )
        return used


def check_budget(
    limit: object, pairs: Sequence[LoRAPair], parameters: Sequence[Tensor], unmeasured: str | None
) -> None:
    """Check the option ``kl_budget``, and that setting B = 0 gives the base model.

    Args:
        limit: value of the option.
        pairs: the LoRA layers.
        parameters: all parameters of the optimizer.
        unmeasured: name of a curvature that cannot compute the KL of a step; None for other curvatures.

    Raises:
        TypeError: if the option is not a number.
        ValueError: if it is not a finite number above 0, the curvature is not suitable, or other parameters than LoRA
            layers train.
    """
    expected = "expected a finite number > 0 (largest KL from the base model, in nats per token)"
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise TypeError(f"kl_budget: got {limit!r} of type {type(limit).__name__}, {expected}")
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"kl_budget: got {limit!r}, {expected}")
    if unmeasured is not None:
        raise ValueError(
            f"kl_budget: curvature={unmeasured!r} cannot compute the KL of a step; choose another curvature"
        )
    lora = {id(p) for pair in pairs for p in (pair.A, pair.B)}
    others = sum(1 for p in parameters if p.requires_grad and id(p) not in lora)
    if others or not pairs:
        found = f"{others} parameters train that belong to no LoRA layer" if pairs else "there are no LoRA layers"
        raise ValueError(
            f"kl_budget: {found}, but setting B = 0 must give the base model; train LoRA layers alone "
            "(no DoRA, no modules_to_save), or leave kl_budget out"
        )
