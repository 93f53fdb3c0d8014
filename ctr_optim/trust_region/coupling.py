"""The coupling kappa: a step's KL measured on the model, divided by the block-diagonal prediction; averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ctr_optim.runtime import distributed
from ctr_optim.settings import calibration_due
from ctr_optim.trust_region.measured import FALL, mixed, newest_share
from ctr_optim.trust_region.others import Others
from ctr_optim.trust_region.protocols import Adapter, Changes, Prober, Quiet, Step

SLOPE_EXPONENT = 0.6  # Exponent of slope^2 in the predicted KL; q has exponent 0.4.
_GUESS = 40.0  # Start value of the first measurement; language models had values between 10 and 400.
_BASE_EVERY = 4  # Measure the whole adapter's coupling at every fourth measurement of a step's coupling.
_LEAST_MOVE = 1e-3  # Smallest KL of a measurement, nats per token: below it, half-precision rounding dominates.
# Largest number of trials in the first measurement and in later ones. A displacement that is too long saturates the KL,
# so each further trial is shorter.
_TRIES, _LATER_TRIES = 8, 3
# Smallest plausible coupling: diagonal metrics of tiny models gave 5e-5; outputs that the loss does not use gave 1e-11.
_LEAST = 1e-6
# The first _FIRST steps are measured, because models change fastest then, and _WATCHED steps after each measurement
# that differs from its prediction by more than a factor of _EXPECTED. Measurements outside the schedule spend a credit:
# _CREDIT at first, and _EARNED more in each step. A measurement costs about a tenth of a step on
# base5m, a quarter on the shape of Llama-2-7B, and less than half where the measured slice is the whole batch.
_FIRST = 24
_WATCHED = 3
_EXPECTED = 1.25
_CREDIT, _EARNED = 24.0, 1 / 50
# Steps without a measurement get a margin for the usual error of predictions beyond this one. Language models have this
# error from batch to batch.
_USUAL_ERROR = 0.3
_FARTHER = 1.5  # A measured step may be longer than the measured displacement by this factor.


@dataclass(slots=True)
class CouplingState:
    """Checkpoint numbers of the coupling.

    Attributes:
        coupling: average kappa of a step; None until measured.
        alignment: average ``slope^2 / q`` of a step; None until measured.
        base_coupling: coupling of the whole adapter, for the KL from the base model; None until measured.
        calibrations: number of measurements so far.
        watched: number of steps to measure outside the schedule, at first and after an unexpected value.
        credit: number of measurements outside the schedule that are still allowed.
        error: root mean square of the logarithm of measured over predicted KL; 0 until measured twice.
    """

    coupling: float | None = None
    alignment: float | None = None
    base_coupling: float | None = None
    calibrations: int = 0
    watched: int = 0
    credit: float = _CREDIT
    error: float = 0.0


class Coupling:
    """Estimator of kappa: measures it on the model at intervals, and extrapolates it to every step.

    Args:
        prober: re-runs the model; None if no single module contains all parameters.
        quiet: returns a context in which forward passes record no statistics.
        interval: largest number of steps between measurements; None: kappa is 1, the plain block-diagonal metric.
        others: receives the KL on tokens outside the loss at each measurement; None: that KL is not computed.

    Attributes:
        state: checkpoint numbers.
        due: whether the coming step is measured.
        shared: whether another caller uses the stored batch after this measurement.
    """

    def __init__(self, prober: Prober | None, quiet: Quiet, interval: int | None, others: Others | None = None) -> None:
        self.prober, self.quiet, self.interval, self.others = prober, quiet, interval, others
        self.state = CouplingState(watched=_FIRST)
        self.extra = False  # whether the measurement is outside the schedule
        self.due = self.shared = False
        self._here: float | None = None  # coupling measured along the current step

    def arm(self, step: int, others: bool = False) -> None:
        """Decide whether the prober stores the coming forward pass.

        Args:
            step: number of steps taken.
            others: whether another caller needs the stored batch.
        """
        in_turn = calibration_due(step, self.interval)
        self.extra = not in_turn and self.interval is not None and self._unsettled and self.state.credit >= 1
        self.due, self.shared = in_turn or self.extra, others
        if self.prober is not None:
            self.prober.enabled = self.due or others

    @property
    def _unsettled(self) -> bool:
        """Whether a recent measurement was unexpected, or predictions err more than those of language models."""
        return self.state.watched > 0 or self.state.error > _USUAL_ERROR

    @property
    def usual(self) -> float:
        """Average kappa of a step; a guess before the first measurement."""
        return 1.0 if self.interval is None else self.state.coupling or _GUESS

    @property
    def of_adapter(self) -> float:
        """Coupling of the whole adapter, for the KL from the base model."""
        return self.state.base_coupling or self.usual

    @property
    def known(self) -> bool:
        """Whether kappa was measured, or is 1 because ``interval`` is None."""
        return self.interval is None or self.state.coupling is not None

    @property
    def source(self) -> str:
        """Source of kappa: ``"measured"``, ``"block-diagonal"``, or ``"assumed (...)"`` with the reason."""
        if self.interval is None:
            return "block-diagonal"
        if self.state.coupling is not None:
            return "measured"
        refused = self.prober.refused if self.prober is not None else "no single model holds all the layers"
        return f"assumed ({refused or 'not measured yet'})"

    def usually(self, step: Step) -> Tensor | float:
        """Return kappa of a step as predicted by the average."""
        if self.state.alignment is None:
            return self.usual
        return self.usual * alignment(step.slope, step.q, self.state.alignment)

    def along(self, step: Step) -> Tensor | float:
        """Return kappa of a step, with the measurement of this step if there is one."""
        kappa = self.usually(step)
        if self._here is None:
            kappa = kappa * margin(self.state.error)
        else:  # A slice that moves little may do so by chance: the average counts for half.
            expected = torch.as_tensor(kappa, dtype=step.q.dtype, device=step.q.device)
            kappa = (expected * self._here).sqrt().clamp_min(self._here)
        return kappa

    def measure(self, step: Step, limit: Tensor | float | None, adapter: Adapter, most: float = 1.0) -> None:
        """Measure the coupling along this step if a measurement is due, at about the step's final length.

        A measured step has at least the measured coupling. While predictions are often wrong, steps are measured
        outside the schedule: a fast-changing coupling would exceed the bound before the next regular measurement.

        The average is over square roots, because one measurement in a hundred is off by a factor of ten. Before
        averaging, :func:`alignment` removes the effect of this step's slope; the average slope is updated as well.

        Args:
            step: the step.
            limit: the step's bound, in nats per token; None for no bound.
            adapter: the trained part of the model.
            most: largest factor that the step may be multiplied by.
        """
        self._here = None
        if self.others is not None:
            self.others.begin()
        self.state.credit = min(_CREDIT, self.state.credit + _EARNED)
        if self.prober is None or not self.due:
            return
        self.state.credit -= self.extra
        self.state.watched = max(0, self.state.watched - 1)
        if distributed.everywhere(self.prober.ready, step.q):
            self._update(step, limit, adapter, most)
        if not self.shared:
            self.prober.release()

    def _update(self, step: Step, limit: Tensor | float | None, adapter: Adapter, most: float) -> None:
        """Measure the coupling, and update the averages."""
        state, slope, q = self.state, step.slope, step.q
        newest = newest_share(state.calibrations)
        typical, usual = slope.square() / q, state.alignment
        aligned = torch.where(typical > 0, alignment(slope, q, usual or typical), 1.0)
        guess = self.usual * aligned
        tries = _LATER_TRIES if state.calibrations else _TRIES
        found = self._measured(step, float(limit or 0.0), guess, tries, most)
        if found is None:
            return
        coupling, least, here = found
        if self.others is not None:
            self.others.settle()
        self._here = max(coupling, least)
        before = state.coupling
        if before is not None:
            error = abs(math.log(coupling / float(guess)))
            state.error = math.hypot(state.error * (1 - newest) ** 0.5, error * newest**0.5)
            if error > math.log(_EXPECTED):
                state.watched = max(state.watched, _WATCHED)
        state.coupling = mixed(before, coupling / float(aligned), newest)
        now = float(typical)
        if now > 0:
            usual = usual or now
            state.alignment = usual ** (1 - newest) * now**newest
            # The average coupling refers to the average slope, so it changes with it.
            state.coupling *= (state.alignment / usual) ** SLOPE_EXPONENT
        if before is not None:
            state.coupling = max(state.coupling, before / FALL)
        state.calibrations += 1
        if state.base_coupling is None or state.calibrations % _BASE_EVERY == 0:
            self._measure_base(here, adapter)

    def _measured(
        self, step: Step, limit: float, guess: Tensor, tries: int, most: float
    ) -> tuple[float, float, Tensor] | None:
        """Return the coupling along a step, the least coupling to step with, and the logits before the step.

        None if the measurement fails. With the least coupling, a step is at most ``_FARTHER`` times as long as the
        measured displacement: beyond it, the KL may not be quadratic.

        The host does not wait for the device before the result, so that the device stays busy during the short pass.

        Args:
            step: the step.
            limit: target KL in nats per token, at least ``_LEAST_MOVE``.
            guess: ``()`` estimate of the coupling; if it is right, the displacement has the target KL.
            tries: largest number of trials; a trial repeats if the estimate is off by more than a factor of two.
            most: largest factor that the step may be multiplied by.
        """
        assert self.prober is not None
        target, q, changes = max(limit, _LEAST_MOVE), step.q, step.changes()
        with self.quiet():
            here = self.prober.logits_in_training()
        if here is None:  # No process has logits.
            return None
        for attempt in range(tries):
            # Displace by at most the step itself or by the smallest KL: the KL of a saturated model grows more slowly
            # than its displacement squared, which would lower the measured coupling.
            unit = (2 / (guess * q)).sqrt()  # factor of the step that has a KL of 1
            epsilon = torch.minimum(unit * target**0.5, (unit * _LEAST_MOVE**0.5).clamp_min(most)).nan_to_num(0.0, 0.0)
            measured = self._kl_at(changes, epsilon, here, q, self.others)
            if measured is None:
                return None
            found = measured / (0.5 * epsilon.square() * q)
            farthest = _FARTHER * epsilon
            least = torch.where(farthest < most, limit / (0.5 * farthest.square() * q), 0.0)
            coupling, off, at_least = torch.stack([found, found / guess, least]).tolist()
            if not (math.isfinite(coupling) and coupling > 0):
                return None
            if coupling < _LEAST:
                self.prober.refused = f"the logits hardly move with the parameters: a coupling of {coupling:.1g}"
                return None
            # A saturated model gives a smaller coupling at every further trial.
            if 0.5 < off < 2 or (off < 1 and attempt >= 2):
                break
            guess = found
        return coupling, at_least, here

    def _kl_at(
        self, changes: Changes, factor: float | Tensor, here: Tensor, like: Tensor, others: Others | None = None
    ) -> Tensor | None:
        """Return ``()`` the KL per loss token from ``here`` to the logits with displaced parameters; None on failure.

        ``others`` receives the KL on the tokens outside the loss.
        """
        assert self.prober is not None
        displaced = self.prober.moved(changes, factor)
        if displaced is None:
            return None
        with self.quiet(), displaced:
            there = self.prober.logits()
        found = None if there is None else self.prober.divergence(here, there)
        if found is None or there is None:
            return None
        inside = distributed.mean(found, like)
        if others is not None:
            others.look(self.prober.divergence_outside(here, there), inside)
        return inside

    def _measure_base(self, here: Tensor, adapter: Adapter) -> None:
        """Measure the KL between the base model (B = 0) and the model, and update the whole adapter's coupling."""
        assert self.prober is not None
        form = adapter.kl_form()
        total = 0.0 if form is None else float(form)
        if form is None or not total > 0:
            return
        measured = self._kl_at([(adapter.switches(), None)], 1.0, here, form)
        found = math.nan if measured is None else float(measured) / total
        if math.isfinite(found):
            self.state.base_coupling = found


def alignment(slope: Tensor, q: Tensor, typical: float | Tensor) -> Tensor:
    """Return ``()`` the ratio of a step's kappa to the average kappa, from the loss's slope along the step.

    Layers and tokens that lower the loss together also change the predictions together. The KL of a step follows
    ``q^0.4 slope^1.2`` much better than q alone, and kappa drifts less (benchmarks/quality/README.md). The ratio of
    ``slope^2 / q`` to its average is clamped to [1/3, 9], because a step with slope 0 also changes the predictions, and
    because the slope is also small where the loss's scale falls, as with rewards that agree. With a lower limit of 1/9,
    single steps of RLOO went to 21 times the bound, with 1/3 to 7 times. A language model's steps stayed within both.

    Args:
        slope: ``()`` inner product of gradient and step.
        q: ``()`` quadratic form of the step.
        typical: average ``slope^2 / q``.
    """
    ratio = slope.square() / (q * typical).clamp_min(torch.finfo(q.dtype).tiny)
    return ratio.clamp(1 / 3, 9) ** SLOPE_EXPONENT


def margin(error: float) -> float:
    """Return the factor on the predicted KL of a step without a measurement, from the usual error of predictions."""
    return math.exp(max(0.0, error - _USUAL_ERROR))
