"""A bound on how far the model moves from its base in all: ``KL(base || model) <= kl_budget``, nats per token.

Near the base model, that KL is quadratic in the way from it: its root is a distance, and one step adds at most its own
length to it. Lengths of steps are known, as the root of each step's KL on the training batch; how much of them is
distance on the retained tokens (``rate``) is learned from one measurement to the next. So:

- between measurements, the distance is predicted by ``rate`` times the path;
- a measurement comes when the path may have used half of what is left, so ever more often as the budget fills;
- a step is shortened where it is longer than what is left, and than a share of the whole (`_STRIDE`);
- if a measurement exceeds the budget, every B shrinks until the KL is within it. The KL is quadratic in B. In that
  metric the nearest point within the budget lies on the straight line to the base model, so the shrink removes the
  step's component along the budget's gradient, and the rest moves along the boundary.
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

TOLERANCE = 0.02  # of the budget, by which a measurement may exceed it
_INTERVAL = 50  # most steps between measurements
_STRIDE = 0.3  # of the whole distance: what a step may always have, lest training stops at the boundary
_FINEST = 0.01  # of the whole distance: below, the path between two measurements does not matter
_LEAST_RATE, _MEMORY = 0.05, 0.7  # of `rate`: its floor, and the share that it keeps of a larger one before
_TRIES = 8


@dataclass(slots=True)
class BudgetState:
    """Numbers of a budget that a checkpoint carries.

    Attributes:
        budget_used: last measured KL from the base model, nats per token; None before the first measurement.
        budget_rate: distance on the measured tokens over the path, both roots of nats.
        budget_path: sum of the roots of the steps' KL since the last measurement.
        budget_age: steps since the last measurement.
    """

    budget_used: float | None = None
    budget_rate: float = 1.0
    budget_path: float = 0.0
    budget_age: int = 0


class Budget:
    """Holds a model within a KL from its base.

    Args:
        limit: nats per token.
        meter: measures the KL.
        pairs: the LoRA layers.
    """

    def __init__(self, limit: float, meter: Meter, pairs: Sequence[LoRAPair]) -> None:
        self.limit, self.meter, self.pairs = limit, meter, list(pairs)
        self.state = BudgetState()

    @property
    def reach(self) -> float:
        """The root of the limit: the distance that the model may have from its base."""
        return math.sqrt(self.limit)

    @property
    def left(self) -> float:
        """Predicted distance that remains within the budget, at least 0."""
        used = math.sqrt(max(self.state.budget_used or 0.0, 0.0))
        return max(self.reach - used - self.state.budget_rate * self.state.budget_path, 0.0)

    def metrics(self) -> dict[str, float | None]:
        """Return the last measurement; ``retain/kl`` only if it was made on retained text."""
        used = {"budget/used": self.state.budget_used, "budget/limit": self.limit}
        return {"retain/kl": self.state.budget_used, **used} if self.meter.on_text else used

    def due(self, length: float) -> bool:
        """Whether a step of this length, the root of its KL, needs a measurement after it."""
        s = self.state
        if s.budget_used is None or s.budget_age + 1 >= _INTERVAL:
            return True
        least = _FINEST * self.reach
        used = math.sqrt(max(s.budget_used, 0.0))
        return s.budget_rate * (s.budget_path + length) >= max(0.5 * (self.reach - used), least)

    def begin(self) -> None:
        """Measure before the first step, if that was not done.

        Raises:
            CannotMeasure: if it cannot be measured.
            ValueError: if the budget is exceeded already.
        """
        if self.state.budget_used is not None:
            return
        used = self._measured()
        if used > self.limit * (1 + TOLERANCE):
            raise ValueError(
                f"kl_budget: the model is {used:.4g} nats per token from its base model (B = 0) already, and "
                f"kl_budget={self.limit:g}; start from a fresh adapter (B = 0; not PiSSA or OLoRA), or raise kl_budget"
            )
        self.state.budget_used = used

    def doubt(self) -> None:
        """The weights were replaced: measure at the next step."""
        self.state.budget_age = _INTERVAL

    def factor(self, length: float) -> float:
        """Return what a step of this length is to be multiplied by."""
        distance = self.state.budget_rate * length
        most = max(self.left, _STRIDE * self.reach)
        return min(1.0, most / distance) if distance > 0 else 1.0

    def moved(self, length: float, measure: bool) -> None:
        """Count a step that was taken; measure, and shrink the adapter until the budget holds.

        Args:
            length: root of the step's KL.
            measure: whether to.
        """
        s = self.state
        s.budget_path, s.budget_age = s.budget_path + length, s.budget_age + 1
        if measure:
            self._learn(self._measured())
        self.meter.release()

    def _learn(self, used: float) -> None:
        """Take a measurement: shrink the adapter where it is too large, and set the rate right."""
        s = self.state
        if s.budget_path > 0:
            gone = abs(math.sqrt(max(used, 0.0)) - math.sqrt(max(s.budget_used or 0.0, 0.0)))
            s.budget_rate = max(gone / s.budget_path, _MEMORY * s.budget_rate, _LEAST_RATE)
        s.budget_used = self._within(used) if used > self.limit else used
        s.budget_path, s.budget_age = 0.0, 0

    @torch.no_grad()
    def _within(self, used: float) -> float:
        """Shrink every B until the budget holds; returns the KL then."""
        weights = [distributed.local(pair.B.detach()) for pair in self.pairs]
        full, share = [weight.clone() for weight in weights], 1.0
        for _ in range(_TRIES):
            # quadratic in B; a little more than that, lest the last percent takes a pass of its own
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
                "kl_budget: the model's predictions are not finite, so that its distance from the base model cannot be "
                "measured; look for a model that overflows in half precision"
            )
        return used


def check_budget(
    limit: object, pairs: Sequence[LoRAPair], parameters: Sequence[Tensor], unmeasured: str | None
) -> None:
    """Check the option, and that the model with B = 0 is the base model.

    Args:
        limit: the option.
        pairs: the LoRA layers.
        parameters: all parameters of the optimizer.
        unmeasured: name of a curvature that gives steps no length; None for other curvatures.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what was expected.
    """
    expected = "expected a finite number > 0 (nats per token that the model may move from its base in all)"
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise TypeError(f"kl_budget: got {limit!r} of type {type(limit).__name__}, {expected}")
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"kl_budget: got {limit!r}, {expected}")
    if unmeasured is not None:
        raise ValueError(f"kl_budget: curvature={unmeasured!r} gives steps no length; choose another curvature")
    lora = {id(p) for pair in pairs for p in (pair.A, pair.B)}
    others = sum(1 for p in parameters if p.requires_grad and id(p) not in lora)
    if others or not pairs:
        found = f"{others} parameters train that belong to no LoRA layer" if pairs else "there are no LoRA layers"
        raise ValueError(
            f"kl_budget: {found}, but setting B = 0 must give the base model; train LoRA layers alone "
            "(no DoRA, no modules_to_save), or leave kl_budget out"
        )
