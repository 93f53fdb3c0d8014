"""The estimator of the coupling: measured steps, unexpected measurements, and limited decreases."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ctr_optim.trust_region.coupling import Coupling

LIMIT = 0.1


@dataclass
class Straight:
    """Step with a quadratic form of 1 and a constant slope."""

    q: Tensor
    slope: Tensor
    tokens: Tensor | None = None

    def changes(self) -> list[Any]:
        return []


class Model:
    """Prober whose KL is exactly ``kappa / 2`` times the squared displacement."""

    enabled, refused, ready = False, None, True

    def __init__(self) -> None:
        self.kappa, self.pushes = 10.0, 0

    def moved(self, changes: Any, factor: Any = 1.0) -> Any:
        self.factor, self.pushes = float(factor), self.pushes + 1
        return nullcontext()

    def logits(self) -> Tensor:
        return torch.zeros(1, 2)

    logits_in_training = logits

    def divergence(self, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(0.5 * self.kappa * self.factor**2), torch.tensor(1.0)

    def release(self) -> None:
        """Do nothing: no batch is stored."""


class Whole:
    per_token = True

    def kl_form(self) -> None:
        return None

    def switches(self) -> list[Tensor]:
        return []


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def coupling(model: Model) -> Coupling:
    return Coupling(model, nullcontext, 50)


def step(coupling: Coupling, index: int) -> float:
    """Return kappa of a step."""
    coupling.arm(index)
    taken = Straight(torch.tensor(1.0), torch.tensor(-1.0))
    coupling.measure(taken, LIMIT, Whole())
    return float(coupling.along(taken))


def settled(coupling: Coupling, steps: int) -> int:
    """Take the first steps, each of which is measured; returns the index of the next step."""
    for index in range(steps):
        step(coupling, index)
    return steps


def test_a_measured_step_has_at_least_the_coupling_that_was_measured(coupling: Coupling, model: Model) -> None:
    """The average lags: after a growth from 10 to 13 at step 1, it was 12.5."""
    assert step(coupling, 0) == pytest.approx(10)
    model.kappa = 13.0
    assert step(coupling, 1) == pytest.approx(13)
    assert coupling.state.coupling is not None and 10 < coupling.state.coupling < 13


def test_a_measurement_below_the_average_counts_for_half(coupling: Coupling, model: Model) -> None:
    """A slice that moves little may be chance: the step has the geometric mean of measurement and average."""
    index = settled(coupling, 25)
    model.kappa = 8.0
    taken = step(coupling, index)
    average = coupling.state.coupling
    assert coupling.due and average is not None and 8 < taken < average
    assert taken == pytest.approx((8 * average) ** 0.5)


def test_the_first_steps_are_measured_and_then_the_schedule_holds(coupling: Coupling, model: Model) -> None:
    due = []
    for index in range(80):
        model.kappa *= 1.003
        step(coupling, index)
        due.append(coupling.due)
    assert [index for index, one in enumerate(due) if one] == [*range(24), 25, 36, 49, 64]


def test_after_a_surprise_the_next_steps_are_measured(coupling: Coupling, model: Model) -> None:
    index = settled(coupling, 36)
    model.kappa = 15.0
    for later in range(index, index + 4):
        kappa = step(coupling, later)
        assert coupling.due and kappa >= 15 * (1 - 1e-6)


def test_measurements_out_of_turn_spend_what_was_earned(coupling: Coupling, model: Model) -> None:
    """A model that surprises at every step is measured once more in 50 steps, not at each of them."""
    extra = 0
    for index in range(1000):
        model.kappa = 10.0 if index % 2 else 40.0
        step(coupling, index)
        extra += coupling.extra
    assert 24 + 16 <= extra <= 24 + 20


def test_steps_between_measurements_have_a_margin_where_predictions_err(coupling: Coupling, model: Model) -> None:
    """Nothing of the spread reached the prediction: of steps that are not measured, half went too far."""
    for index in range(60):
        model.kappa = 10.0 if index % 2 else 40.0
        kappa = step(coupling, index)
    average, error = coupling.state.coupling, coupling.state.error
    assert not coupling.due and average is not None and error > 0.5
    assert kappa == pytest.approx(average * math.exp(error - 0.3))


def test_steps_between_measurements_have_no_margin_where_predictions_are_right(
    coupling: Coupling, model: Model
) -> None:
    for index in range(30):
        model.kappa *= 1.003
        kappa = step(coupling, index)
    assert not coupling.due and kappa == pytest.approx(coupling.state.coupling)


def test_one_measurement_lowers_the_coupling_fourfold_at_most(coupling: Coupling, model: Model) -> None:
    step(coupling, 0)
    model.kappa = 1e-3
    step(coupling, 1)
    assert coupling.state.coupling == pytest.approx(10 / 4)
    step(coupling, 2)
    assert coupling.due and coupling.state.coupling == pytest.approx(10 / 16)


@pytest.mark.parametrize("most", [1.0, 0.2, 400.0])
def test_a_step_goes_little_farther_than_its_measurement(coupling: Coupling, model: Model, most: float) -> None:
    """A KL that is flat up to the measured displacement gives a small coupling; beyond it, the KL may jump."""
    model.divergence = lambda here, there: (torch.tensor(0.03), torch.tensor(1.0))  # type: ignore[method-assign]
    taken = Straight(torch.tensor(100.0), torch.tensor(-1.0))
    coupling.arm(0)
    coupling.measure(taken, LIMIT, Whole(), most)
    kappa = float(coupling.along(taken))
    scale = min(most, (LIMIT / (0.5 * kappa * 100.0)) ** 0.5)
    assert model.pushes == 3 and scale <= 1.5 * model.factor * (1 + 1e-6)
    assert kappa >= 0.06 / (100 * model.factor**2) * (1 - 1e-6), "the measured coupling is the least"
