"""How far one step may move the model: the bound on the KL per token, and how it changes during training.

A bound owns ``max_kl`` and its live value. A new kind is one class and one entry of :data:`BOUNDS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ctr_optim.settings import EVERYDAY_RATE, LEARNING_RATE


@dataclass(frozen=True)
class Evidence:
    """What a bound may look at before a step.

    Attributes:
        rate: largest ratio of a group's learning rate to its peak, in [0, 1].
        flat: steps since that ratio changed last.
        tokens: ``()`` loss tokens of this step, over micro-batches and processes; None where they are not known.
        passes: ``()`` how often a row was seen so far, on average; None where rows are not known.
    """

    rate: float
    flat: int = 0
    tokens: Tensor | None = None
    passes: Tensor | None = None


@dataclass(slots=True)
class BoundState:
    """Numbers of a bound that a checkpoint carries.

    Attributes:
        max_kl: live value of the bound before any schedule, nats per token; None for no trust region.
        rate: last ratio of the learning rate to its peak; flat: steps since it changed.
    """

    max_kl: float | None
    rate: float = 0.0
    flat: int = 0


Factors = Mapping[str, Tensor | float]


class Bound(Protocol):
    """The bound of a step, in nats per token: its ``max_kl`` times factors, each with the name of its reason.

    Attributes:
        state: numbers that a checkpoint carries.
        needs_closure: whether :meth:`judge` wants the loss before and after a step.
        needs_rows: whether it looks at :attr:`Evidence.passes`.
        sets_length: whether a step may be longer than its learning rate says, so that only the schedule of the rate
            matters.
    """

    state: BoundState
    needs_closure: ClassVar[bool]
    needs_rows: ClassVar[bool]
    sets_length: ClassVar[bool]

    def factors(self, evidence: Evidence) -> Factors:
        """What ``max_kl`` is multiplied by in the coming step, by reason."""

    def judge(self, gained: float, promised: float) -> None:
        """Learn from a step: by how much the loss fell, and by how much the quadratic model said that it would."""


class Constant:
    """``max_kl`` at every step."""

    needs_closure: ClassVar[bool] = False
    needs_rows: ClassVar[bool] = False
    sets_length: ClassVar[bool] = False

    def __init__(self, max_kl: float | None) -> None:
        self.state = BoundState(max_kl)

    def factors(self, evidence: Evidence) -> Factors:
        return {}

    def judge(self, gained: float, promised: float) -> None:
        """A constant bound learns nothing."""


class FollowsRate(Constant):
    """``max_kl (lr / peak lr)^2``: the KL is quadratic in the step's length, so lengths follow the schedule."""

    def factors(self, evidence: Evidence) -> Factors:
        return {"schedule": evidence.rate**2}


class Auto(FollowsRate):
    """Follows the learning rate's schedule, decays where there is none, asks for loss tokens and for new rows.

    A batch of N loss tokens says little of what the model should do on other tokens: below ``enough`` tokens the bound
    shrinks in proportion, so that a few labels that cannot be learned do not move the whole model. Without a schedule,
    steps of one length keep the model at a distance from its optimum: the bound falls as ``1 / (1 + t / patience)``
    over t steps at one rate. A row that was seen before teaches less than a new one, and can be memorised: where each
    row was seen n times on average, the bound falls as ``n ** -repeats``, to ``least`` of itself.
    """

    needs_rows: ClassVar[bool] = True
    sets_length: ClassVar[bool] = True
    enough: ClassVar[float] = 256.0
    patience: ClassVar[float] = 25.0
    repeats: ClassVar[float] = 8.0
    least: ClassVar[float] = 1e-3

    def factors(self, evidence: Evidence) -> Factors:
        found = {**super().factors(evidence), "constant_rate": 1 / (1 + evidence.flat / self.patience)}
        if evidence.tokens is not None:
            found["few_tokens"] = (evidence.tokens / self.enough).clamp_max(1.0)
        if evidence.passes is not None:
            found["seen_rows"] = (evidence.passes**-self.repeats).clamp_min(self.least)
        return found


class Adaptive(Constant):
    """Levenberg-Marquardt's rule on the ratio of actual to promised reduction of the loss."""

    needs_closure: ClassVar[bool] = True

    def __init__(self, max_kl: float | None) -> None:
        super().__init__(max_kl)
        self.initial = max_kl

    def judge(self, gained: float, promised: float) -> None:
        if self.state.max_kl is not None and self.initial is not None:
            self.state.max_kl = adapted_bound(self.state.max_kl, self.initial, gained, promised)


BOUNDS: dict[str, type[Constant]] = {"auto": Auto, "lr": FollowsRate, "constant": Constant, "adaptive": Adaptive}


def adapted_bound(bound: float, initial: float, actual: float, predicted: float) -> float:
    """The bound after one step by Levenberg-Marquardt's rule.

    Above 3/4 the quadratic model is good and the bound grows by half; below 1/4 it is poor and the bound halves. The
    bound stays within a factor of 100 of its initial value.
    """
    ratio = actual / predicted if predicted > 0 else 0.0
    if ratio > 0.75:
        bound *= 1.5
    elif not ratio >= 0.25:
        bound *= 0.5
    return min(max(bound, initial / 100), initial * 100)


def rate_ratio(groups: Sequence[dict[str, Any]]) -> float:
    """Largest ratio of a group's learning rate to its peak; the peak is kept in the group.

    The peak is the largest of the learning rates seen and the ``initial_lr`` that schedulers leave in a group.
    """
    ratio = 0.0
    for group in groups:
        lr = float(group["lr"])
        group["peak_lr"] = max(group.get("peak_lr", 0.0), float(group.get("initial_lr", 0.0)), lr)
        ratio = max(ratio, lr / group["peak_lr"] if group["peak_lr"] > 0 else 0.0)
    return ratio


def largest_factor(bound: Bound, groups: Sequence[dict[str, Any]]) -> float:
    """The most that a step may be multiplied by: 1, or what makes the largest peak rate the default one."""
    peak = max((float(group["peak_lr"]) for group in groups), default=0.0)
    return LEARNING_RATE / peak if bound.sets_length and peak > 0 else 1.0


def everyday_factor(groups: Sequence[dict[str, Any]]) -> float:
    """Factor from the default learning rate to AdamW's everyday rate; 1 where a rate was chosen.

    The default rate relies on a bound in nats; where the KL cannot be measured, no such bound holds.
    """
    default = all(float(group["peak_lr"]) == LEARNING_RATE for group in groups)
    return EVERYDAY_RATE / LEARNING_RATE if default else 1.0


def limit_of(bound: Bound, factors: Factors) -> Tensor | float | None:
    """The bound of a step in nats per token; None for no bound."""
    return None if bound.state.max_kl is None else bound.state.max_kl * math.prod(factors.values())  # type: ignore


def observed(
    state: BoundState, groups: Sequence[dict[str, Any]], tokens: Tensor | None, passes: Tensor | None = None
) -> Evidence:
    """The evidence of the coming step; counts in ``state`` for how long the rate has stayed the same."""
    rate = rate_ratio(groups)
    state.flat = state.flat + 1 if rate == state.rate else 0
    state.rate = rate
    return Evidence(rate, state.flat, tokens, passes)
