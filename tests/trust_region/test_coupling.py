"""The estimator of the coupling: measured steps, unexpected measurements, and limited decreases."""

from __future__ import annotations

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


def test_a_measured_step_has_at_least_the_coupling_that_was_measured(coupling: Coupling, model: Model) -> None:
    """The average lags: after a growth from 10 to 13 at step 1, it was 12.5."""
    assert step(coupling, 0) == pytest.approx(10)
    model.kappa = 13.0
    assert step(coupling, 1) == pytest.approx(13)
    assert coupling.state.coupling is not None and 10 < coupling.state.coupling < 13
    assert step(coupling, 2) == pytest.approx(coupling.state.coupling)  # A step without a measurement uses the average.


def test_after_a_surprise_the_next_steps_are_measured(coupling: Coupling, model: Model) -> None:
    for index in range(4):
        step(coupling, index)
    model.kappa = 40.0
    step(coupling, 4)
    due = []
    for index in range(5, 12):
        kappa = step(coupling, index)
        due.append(coupling.due)
        assert not coupling.due or kappa >= 40 * (1 - 1e-6)
    assert due == [True] * 3 + [False, True, False, False]  # Step 9 is due anyway; steps 4 to 7 gave expected values.


def test_without_a_surprise_the_schedule_stays(coupling: Coupling, model: Model) -> None:
    due = []
    for index in range(30):
        model.kappa *= 1.02
        step(coupling, index)
        due.append(coupling.due)
    assert [index for index, one in enumerate(due) if one] == [0, 1, 4, 9, 16, 25]


def test_one_measurement_lowers_the_coupling_fourfold_at_most(coupling: Coupling, model: Model) -> None:
    step(coupling, 0)
    model.kappa = 1e-3
    step(coupling, 1)
    assert coupling.state.coupling == pytest.approx(10 / 4)
    step(coupling, 2)  # The unexpected value causes another measurement, so that the average follows a real decrease.
    assert coupling.due and coupling.state.coupling == pytest.approx(10 / 16)
