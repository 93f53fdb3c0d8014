"""The bound on the KL divergence per token of one step, and how it changes during training.

A bound owns ``max_kl`` and its live value. A new kind of bound is one class and one entry in :data:`BOUNDS`.
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
    """Inputs of a bound before a step.

    Attributes:
        rate: largest ratio of a group's learning rate to its peak, in [0, 1].
        flat: number of steps since this ratio last changed.
        tokens: ``()`` number of loss tokens of this step, over micro-batches and processes; None if unknown.
        passes: ``()`` how often training used each row on average, without repeats among new rows. A repeat counts by
            the factor ``schedule`` of its step. None if unknown.
        others: ratio of the step's KL per token outside the loss to its KL per loss token; None if unknown.
    """

    rate: float
    flat: int = 0
    tokens: Tensor | None = None
    passes: Tensor | None = None
    others: float | None = None


@dataclass(slots=True)
class BoundState:
    """Checkpoint numbers of a bound.

    Attributes:
        max_kl: live value of the bound before its factors, in nats per token; None for no trust region.
        rate: last ratio of the learning rate to its peak.
        flat: number of steps since this ratio changed.
    """

    max_kl: float | None
    rate: float = 0.0
    flat: int = 0


Factors = Mapping[str, Tensor | float]


class Bound(Protocol):
    """The bound of a step in nats per token: ``max_kl`` times named factors.

    Attributes:
        state: checkpoint numbers.
        needs_closure: whether :meth:`judge` needs the loss before and after a step.
        needs_rows: whether it uses :attr:`Evidence.passes`.
        sets_length: whether the bound may lengthen a step beyond its learning rate. Then only the shape of the
            learning rate's schedule matters.
        averaged: whether the average of the weights is used, which tolerates longer steps at a constant rate.
    """

    state: BoundState
    averaged: bool
    needs_closure: ClassVar[bool]
    needs_rows: ClassVar[bool]
    sets_length: ClassVar[bool]

    @property
    def needs_others(self) -> bool:
        """Whether it uses :attr:`Evidence.others`."""

    def factors(self, evidence: Evidence) -> Factors:
        """Return the factors of ``max_kl`` for the coming step, by name."""

    def judge(self, gained: float, promised: float) -> None:
        """Adapt the bound to a step's actual and predicted reduction of the loss.

        Args:
            gained: actual reduction of the loss.
            promised: reduction that the quadratic model predicted.
        """


class Constant:
    """Bound that equals ``max_kl`` at every step."""

    needs_closure: ClassVar[bool] = False
    needs_rows: ClassVar[bool] = False
    sets_length: ClassVar[bool] = False

    def __init__(self, max_kl: float | None) -> None:
        self.state, self.averaged = BoundState(max_kl), False

    @property
    def needs_others(self) -> bool:
        return False

    def factors(self, evidence: Evidence) -> Factors:
        return {}

    def judge(self, gained: float, promised: float) -> None:
        """Do nothing: a constant bound does not adapt."""


class FollowsRate(Constant):
    """Bound ``max_kl (lr / peak lr)^2``: the KL is quadratic in the step's length, so lengths follow the schedule."""

    def factors(self, evidence: Evidence) -> Factors:
        return {"schedule": kl_ratio(evidence.rate)}


class Auto(FollowsRate):
    """Bound that follows the learning rate's schedule, and shrinks at a constant rate, with few tokens or old rows.

    - ``schedule``: as :class:`FollowsRate`.
    - ``constant_rate``: at a constant learning rate, steps of equal length never settle at an optimum. The factor is
      ``1 / (1 + t / patience)`` after t steps at one rate, with ``averaged_patience`` if the weights are averaged.
    - ``few_tokens``: a few labels that cannot be learned must not change the whole model. Below ``enough`` loss tokens,
      the factor is proportional to their number.
    - ``seen_rows``: repeated rows can be memorised. If training used each row n times on average, the factor is
      ``n ** -repeats``, and at least ``least``. A repeat counts by its step's ``schedule``: after two epochs at a
      constant rate, n is 2; if the rate falls to zero along a cosine over both epochs, n is 1.06.
    - ``other_tokens``: a step also changes the model on prompts. The factor lowers the bound if the step's KL per token
      outside the loss would exceed ``outside`` nats. This limit follows ``schedule`` and ``constant_rate`` as well.
      With the default of inf, the KL outside the loss is not measured, and the factor does not exist.
    """

    needs_rows: ClassVar[bool] = True
    sets_length: ClassVar[bool] = True
    enough: ClassVar[float] = 256.0
    patience: ClassVar[float] = 25.0
    averaged_patience: ClassVar[float] = 100.0
    repeats: ClassVar[float] = 12.0
    least: ClassVar[float] = 1e-3
    outside: ClassVar[float] = math.inf

    @property
    def needs_others(self) -> bool:
        return self.state.max_kl is not None and math.isfinite(self.outside)

    def factors(self, evidence: Evidence) -> Factors:
        patience = self.averaged_patience if self.averaged else self.patience
        common = {**super().factors(evidence), "constant_rate": 1 / (1 + evidence.flat / patience)}
        found: dict[str, Tensor | float] = {}
        if evidence.tokens is not None:
            found["few_tokens"] = (evidence.tokens / self.enough).clamp_max(1.0)
        if evidence.passes is not None:
            found["seen_rows"] = (evidence.passes**-self.repeats).clamp_min(self.least)
        if self.state.max_kl is not None and self.needs_others and evidence.others is not None:
            inside = self.state.max_kl * math.prod(found.values())  # type: ignore
            found["other_tokens"] = within_outside(inside, self.outside, evidence.others)
        return {**common, **found}


class Adaptive(Constant):
    """Bound that follows Levenberg-Marquardt's rule on the ratio of actual to predicted loss reduction."""

    needs_closure: ClassVar[bool] = True

    def __init__(self, max_kl: float | None) -> None:
        super().__init__(max_kl)
        self.initial = max_kl

    def judge(self, gained: float, promised: float) -> None:
        if self.state.max_kl is not None and self.initial is not None:
            self.state.max_kl = adapted_bound(self.state.max_kl, self.initial, gained, promised)


BOUNDS: dict[str, type[Constant]] = {"auto": Auto, "lr": FollowsRate, "constant": Constant, "adaptive": Adaptive}


def within_outside(bound: Tensor | float, outside: float, ratio: float) -> Tensor | float:
    """Return the factor in (0, 1] that keeps ``ratio`` times a bound within a limit outside the loss.

    Args:
        bound: bound on the KL per loss token, in nats.
        outside: limit of the KL per token outside the loss, in nats.
        ratio: KL per token outside the loss over KL per loss token.
    """
    factor = outside / (bound * ratio)
    return factor.clamp_max(1.0) if isinstance(factor, Tensor) else min(1.0, factor)


def adapted_bound(bound: float, initial: float, actual: float, predicted: float) -> float:
    """Return the bound after one step by Levenberg-Marquardt's rule, in nats per token.

    If the ratio of actual to predicted reduction is above 3/4, the bound grows by half; below 1/4, it halves. The bound
    stays within a factor of 100 of its initial value.

    Args:
        bound, initial: current and initial bound, in nats per token.
        actual, predicted: reductions of the loss.
    """
    ratio = actual / predicted if predicted > 0 else 0.0
    if ratio > 0.75:
        bound *= 1.5
    elif not ratio >= 0.25:
        bound *= 0.5
    return min(max(bound, initial / 100), initial * 100)


def kl_ratio(rate: float) -> float:
    """Return the ratio of a step's KL to its KL at the peak learning rate.

    Args:
        rate: ratio of the learning rate to its peak, in [0, 1].
    """
    return rate**2


def rate_ratio(groups: Sequence[dict[str, Any]]) -> float:
    """Return the largest ratio of a group's learning rate to its peak; update ``peak_lr`` in every group.

    The peak is the largest learning rate so far, or the ``initial_lr`` of torch's schedulers if that is larger.
    """
    ratio = 0.0
    for group in groups:
        lr = float(group["lr"])
        group["peak_lr"] = max(group.get("peak_lr", 0.0), float(group.get("initial_lr", 0.0)), lr)
        ratio = max(ratio, lr / group["peak_lr"] if group["peak_lr"] > 0 else 0.0)
    return ratio


def largest_factor(bound: Bound, groups: Sequence[dict[str, Any]]) -> float:
    """Return the largest factor of a step: 1, or the default learning rate over the largest peak rate."""
    peak = max((float(group["peak_lr"]) for group in groups), default=0.0)
    return LEARNING_RATE / peak if bound.sets_length and peak > 0 else 1.0


def everyday_factor(groups: Sequence[dict[str, Any]]) -> float:
    """Return AdamW's usual rate over the default learning rate; 1 if the user chose a rate.

    The default rate needs a bound in nats, which does not exist if the KL cannot be measured.
    """
    default = all(float(group["peak_lr"]) == LEARNING_RATE for group in groups)
    return EVERYDAY_RATE / LEARNING_RATE if default else 1.0


def limit_of(bound: Bound, factors: Factors) -> Tensor | float | None:
    """Return the bound of a step in nats per token; None for no bound."""
    return None if bound.state.max_kl is None else bound.state.max_kl * math.prod(factors.values())  # type: ignore


def observed(
    state: BoundState,
    rate: float,
    tokens: Tensor | None,
    passes: Tensor | None = None,
    others: float | None = None,
) -> Evidence:
    """Return the evidence for the coming step; update ``rate`` and ``flat`` in ``state``.

    Args:
        state: checkpoint numbers of the bound.
        rate, tokens, passes, others: as in :class:`Evidence`.
    """
    state.flat = state.flat + 1 if rate == state.rate else 0
    state.rate = rate
    return Evidence(rate, state.flat, tokens, passes, others)
