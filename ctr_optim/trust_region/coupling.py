"""The coupling kappa: the model's own KL along a step over the block-diagonal prediction, measured and averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ctr_optim.runtime import distributed
from ctr_optim.settings import calibration_due
from ctr_optim.trust_region.protocols import Adapter, Changes, Prober, Quiet, Step

SLOPE_EXPONENT = 0.6  # of slope^2 in the prediction; q has the rest
_GUESS = 40.0  # where the first measurement starts from; language models were seen between 10 and 400
_BASE_EVERY = 4  # measurements of a step's coupling for one of the whole adapter's
_LEAST_MOVE = 1e-3  # nats per token; below, logits in half precision would measure their own rounding
# Pushes of the first measurement, and of others; an over-long push saturates, and each further one is shorter.
_TRIES, _LATER_TRIES = 8, 3
# The least that is believed: diagonal metrics of tiny models were seen at 5e-5, outputs that do not carry the loss at
# 1e-11.
_LEAST = 1e-6
# Every one of the first steps is measured, when models change fastest, and so many steps after a surprise, which is a
# measurement off its prediction by more than a factor. Measurements out of turn spend a credit of so many at first, and
# one more in 25 steps: a measurement costs about a tenth of a step, less than half where the slice is the whole batch.
_FIRST = 24
_WATCHED = 3
_EXPECTED = 1.25
_CREDIT, _EARNED = 24.0, 1 / 25
# A step that is not measured is taken to move the model further than the average says, by the usual error of
# predictions beyond this one, which language models have from one batch to the next.
_USUAL_ERROR = 0.3
_FALL = 4.0  # most that one measurement lowers the usual kappa by: a step that is too long costs more than a short one
_NEWEST = 0.2  # least weight of a measurement among those before it: single ones are off by a third


@dataclass(slots=True)
class CouplingState:
    """Numbers of the coupling that a checkpoint carries.

    Attributes:
        coupling: kappa of a usual step; None until measured.
        alignment: usual ``slope^2 / q`` of a step.
        base_coupling: coupling of the whole adapter, for the KL from the base model.
        calibrations: measurements so far.
        watched: coming steps that are measured out of turn, at first and after a measurement that surprised.
        credit: measurements out of turn that may still be made.
        error: root mean square of the logarithm of measured over predicted KL; 0 until measured twice.
    """

    coupling: float | None = None
    alignment: float | None = None
    base_coupling: float | None = None
    calibrations: int = 0
    watched: int = _FIRST
    credit: float = _CREDIT
    error: float = 0.0


class Coupling:
    """Measures kappa on the model at intervals, and extrapolates it from step to step.

    Args:
        prober: runs the model again; None where no single model holds all parameters.
        quiet: makes a context in which forward passes leave no statistics.
        interval: most steps between measurements; None: kappa is 1, the plain block-diagonal metric.

    Attributes:
        state: numbers that a checkpoint carries.
        kappa: kappa of the last step; None before the first step.
    """

    def __init__(self, prober: Prober | None, quiet: Quiet, interval: int | None) -> None:
        self.prober, self.quiet, self.interval = prober, quiet, interval
        self.state = CouplingState()
        self.extra = False  # whether a measurement is out of turn
        self.due = self.shared = False  # whether we measure, and whether others use the kept batch after us
        self.kappa: Tensor | float | None = None
        self._here: float | None = None  # measured along this very step

    def arm(self, step: int, others: bool = False) -> None:
        """Decide whether the coming forward pass is kept, for our measurement or for ``others``."""
        in_turn = calibration_due(step, self.interval)
        self.extra = not in_turn and self.interval is not None and self._unsettled and self.state.credit >= 1
        self.due, self.shared = in_turn or self.extra, others
        if self.prober is not None:
            self.prober.enabled = self.due or others

    @property
    def _unsettled(self) -> bool:
        """Whether predictions have surprised lately, or err more than a language model's."""
        return self.state.watched > 0 or self.state.error > _USUAL_ERROR

    @property
    def usual(self) -> float:
        """kappa of a usual step."""
        return 1.0 if self.interval is None else self.state.coupling or _GUESS

    @property
    def of_adapter(self) -> float:
        """Coupling of the whole adapter, for the KL from the base model."""
        return self.state.base_coupling or self.usual

    @property
    def known(self) -> bool:
        """Whether the scale is known: measured, or left out on request."""
        return self.interval is None or self.state.coupling is not None

    @property
    def source(self) -> str:
        """Origin of the coupling: ``"measured"``, or the reason why it is not."""
        if self.interval is None:
            return "block-diagonal"
        if self.state.coupling is not None:
            return "measured"
        refused = self.prober.refused if self.prober is not None else "no single model holds all the layers"
        return f"assumed ({refused or 'not measured yet'})"

    def along(self, step: Step) -> Tensor | float:
        """kappa of this step."""
        kappa: Tensor | float = self.usual
        if self.state.alignment is not None:
            kappa = kappa * alignment(step.slope, step.q, self.state.alignment)
        if self._here is None:
            kappa = kappa * margin(self.state.error)
        else:
            expected = torch.as_tensor(kappa, dtype=step.q.dtype, device=step.q.device)
            kappa = (expected * self._here).sqrt().clamp_min(self._here)  # a slice that moves little may be chance
        self.kappa = kappa
        return kappa

    def measure(self, step: Step, limit: Tensor | float | None, adapter: Adapter) -> None:
        """Measure the coupling along this step, if one is due, at about the length that the step will have.

        A step that was measured has at least the measured coupling. While predictions are often wrong, steps are
        measured out of turn: a model whose coupling changes fast would leave its bound before the next one is due.

        Measurements are averaged by their square roots, since one in a hundred is off by a factor of ten. The part
        that this step's slope explains (:func:`alignment`) is taken out before; the usual slope moves with the average.

        Args:
            step: the step.
            limit: its bound, nats per token.
            adapter: the trained part of the model.
        """
        self._here = None
        self.state.credit = min(_CREDIT, self.state.credit + _EARNED)
        if self.prober is None or not self.due:
            return
        self.state.credit -= self.extra
        self.state.watched = max(0, self.state.watched - 1)
        if distributed.everywhere(self.prober.ready, step.q):
            self._update(step, limit, adapter)
        if not self.shared:
            self.prober.release()

    def _update(self, step: Step, limit: Tensor | float | None, adapter: Adapter) -> None:
        """Measure, and fold the measurement into the state."""
        state, slope, q = self.state, step.slope, step.q
        newest = max(_NEWEST, 5 / (5 + state.calibrations))  # the first counts least: models change fastest then
        typical, usual = slope.square() / q, state.alignment
        aligned = torch.where(typical > 0, alignment(slope, q, usual or typical), 1.0)
        guess = self.usual * aligned
        found = self._measured(step, float(limit or 0.0), guess, tries=_LATER_TRIES if state.calibrations else _TRIES)
        if found is None:
            return
        coupling, here = found
        self._here = coupling
        before = state.coupling
        if before is not None:
            error = abs(math.log(coupling / float(guess)))
            state.error = math.hypot(state.error * (1 - newest) ** 0.5, error * newest**0.5)
            if error > math.log(_EXPECTED):
                state.watched = max(state.watched, _WATCHED)
        state.coupling = _mixed(before, coupling / float(aligned), newest)
        now = float(typical)
        if now > 0:
            usual = usual or now
            state.alignment = usual ** (1 - newest) * now**newest
            # the coupling of a usual step follows the usual slope
            state.coupling *= (state.alignment / usual) ** SLOPE_EXPONENT
        if before is not None:
            state.coupling = max(state.coupling, before / _FALL)
        state.calibrations += 1
        if state.base_coupling is None or state.calibrations % _BASE_EVERY == 0:
            self._measure_base(here, adapter)

    def _measured(self, step: Step, limit: float, guess: Tensor, tries: int) -> tuple[float, Tensor] | None:
        """The coupling along a step, and the logits before it; None where none can be had.

        Until it is known, nothing waits for the device: the pass is short, and it should not run out of work.

        Args:
            guess: ``()`` of the coupling; the model is pushed about as far as the step will go if it is right.
            tries: where it was off by more than a factor of two, push again.
        """
        assert self.prober is not None
        target, q, changes = max(limit, _LEAST_MOVE), step.q, step.changes()
        with self.quiet():
            here = self.prober.logits_in_training()
        if here is None:  # nobody has any
            return None
        for attempt in range(tries):
            # no further than the step itself goes, or the least move: a model that cannot reach the target would look
            # flatter the further one pushes it
            unit = (2 / (guess * q)).sqrt()  # where the KL would be 1
            epsilon = torch.minimum(unit * target**0.5, (unit * _LEAST_MOVE**0.5).clamp_min(1.0)).nan_to_num(0.0, 0.0)
            measured = self._kl_at(changes, epsilon, here, q)
            if measured is None:
                return None
            found = measured / (0.5 * epsilon.square() * q)
            coupling, off = torch.stack([found, found / guess]).tolist()
            if not (math.isfinite(coupling) and coupling > 0):
                return None
            if coupling < _LEAST:
                self.prober.refused = f"the logits hardly move with the parameters: a coupling of {coupling:.1g}"
                return None
            # a model that cannot reach the target looks flatter with every further push
            if 0.5 < off < 2 or (off < 1 and attempt >= 2):
                break
            guess = found
        return coupling, here

    def _kl_at(self, changes: Changes, factor: float | Tensor, here: Tensor, like: Tensor) -> Tensor | None:
        """``()`` the KL per token from ``here`` to the model with its parameters displaced; None where that fails."""
        assert self.prober is not None
        displaced = self.prober.moved(changes, factor)
        if displaced is None:
            return None
        with self.quiet(), displaced:
            there = self.prober.logits()
        found = None if there is None else self.prober.divergence(here, there)
        return None if found is None else distributed.mean(found, like)

    def _measure_base(self, here: Tensor, adapter: Adapter) -> None:
        """Measure the KL from the base model (B = 0), and with it the coupling of the whole adapter."""
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
    """``()`` how much larger than usual a step's KL is for its quadratic form, from the loss's slope along the step.

    Layers and tokens that lower the loss together move the predictions together: from one step to the next, the KL
    follows ``q^0.4 slope^1.2`` far better than q alone, and kappa drifts less, too (benchmarks/README.md). The
    ratio of ``slope^2 / q`` to its usual value counts within a factor of 9: a step along which the loss is level moves
    the predictions, too.

    Args:
        slope: ``()`` inner product of gradient and step.
        q: ``()`` the step's quadratic form.
        typical: the usual ``slope^2 / q``.
    """
    ratio = slope.square() / (q * typical).clamp_min(torch.finfo(q.dtype).tiny)
    return ratio.clamp(1 / 9, 9) ** SLOPE_EXPONENT


def margin(error: float) -> float:
    """Factor on the predicted KL of a step that is not measured, from the usual error of predictions."""
    return math.exp(max(0.0, error - _USUAL_ERROR))


def _mixed(before: float | None, new: float, weight: float) -> float:
    """Mean of the former value and a measurement, as lengths, with ``weight`` for the latter."""
    return new if before is None else ((1 - weight) * before**0.5 + weight * new**0.5) ** 2
