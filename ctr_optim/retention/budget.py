"""A bound on the model's total distance from its base: ``KL(base || model) <= kl_budget``, in nats per token.

Near the base model, this KL is quadratic in the displacement of the weights. Its square root is therefore a distance,
and one step adds at most the step's own length. The length of a step is the square root of its KL bound, or without a
bound, of its predicted KL. The path is the sum of these lengths. ``rate`` is the distance on the measured tokens per
unit of path; every measurement updates it.

- Between measurements, the distance is predicted to grow by ``rate`` times the path.
- A measurement follows once this product reaches half of the remaining distance. Measurements therefore become more
  frequent as the budget fills.
- A step is shortened if it is longer than the remaining distance and also longer than ``_STRIDE`` of the total.
- If a measurement exceeds the budget, every B shrinks until the KL is within the budget. Since the KL is quadratic
  in B, the nearest point within the budget lies on the straight line to the base model. Shrinking removes the step's
  component along the gradient of the budget; the other components move along the boundary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctr_optim.model.pair import LoRAPair
from ctr_optim.retention.meter import CannotMeasure, Meter
from ctr_optim.runtime import distributed

TOLERANCE = 0.02  # relative excess over the budget that is allowed at the start
_INTERVAL = 50  # largest number of steps between measurements
_STRIDE = 0.3  # share of the total distance that every step may use; without it, training would stop at the boundary
_FINEST = 0.01  # share of the total distance; a shorter path needs no measurement
_LEAST_RATE, _MEMORY = 0.05, 0.7  # smallest `rate`, and smallest ratio of a new `rate` to the old one
_TRIES = 8  # largest number of attempts to shrink


@dataclass(slots=True)
class BudgetState:
    """Numbers of a budget that checkpoints contain.

    Attributes:
        budget_used: last measured KL from the base model, in nats per token; None before the first measurement.
        budget_rate: distance on the measured tokens per unit of path.
        budget_path: sum of the steps' lengths since the last measurement.
        budget_age: steps since the last measurement.
    """

    budget_used: float | None = None
    budget_rate: float = 1.0
    budget_path: float = 0.0
    budget_age: int = 0


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
        self.state.budget_age = _INTERVAL

    def factor(self, length: float) -> float:
        """Return the factor in (0, 1] by which to shorten a step of this length."""
        distance = self.state.budget_rate * length
        most = max(self.left, _STRIDE * self.reach)
        return min(1.0, most / distance) if distance > 0 else 1.0

    def moved(self, length: float, measure: bool) -> None:
        """Count a step; if ``measure``, measure the KL and shrink the adapter if the KL exceeds the budget.

        Args:
            length: length of the step.
            measure: whether to measure.

        Raises:
            CannotMeasure: if the KL cannot be measured.
        """
        s = self.state
        s.budget_path, s.budget_age = s.budget_path + length, s.budget_age + 1
        if measure:
            self._learn(self._measured())
        self.meter.release()

    def _learn(self, used: float) -> None:
        """Update the state with a measurement, and shrink the adapter if the measurement exceeds the budget."""
        s = self.state
        if s.budget_path > 0:
            gone = abs(math.sqrt(max(used, 0.0)) - math.sqrt(max(s.budget_used or 0.0, 0.0)))
            s.budget_rate = max(gone / s.budget_path, _MEMORY * s.budget_rate, _LEAST_RATE)
        s.budget_used = self._within(used) if used > self.limit else used
        s.budget_path, s.budget_age = 0.0, 0

    @torch.no_grad()
    def _within(self, used: float) -> float:
        """Shrink every B until the KL is within the budget, and return that KL."""
        weights = [distributed.local(pair.B.detach()) for pair in self.pairs]
        full, share = [weight.clone() for weight in weights], 1.0
        for _ in range(_TRIES):
            # The KL is quadratic in B. Aim slightly below the limit, so that one attempt usually suffices.
            share *= math.sqrt(self.limit * (1 - TOLERANCE / 2) / used)
            torch._foreach_copy_(weights, torch._foreach_mul(full, share))
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
