"""The trust region at work: predict how far a step moves the model, measure it now and then, and hold the bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctr_optim.curvature.capture import Taps
from ctr_optim.curvature.kfac import Block
from ctr_optim.direction.stack import Stack
from ctr_optim.runtime import distributed
from ctr_optim.runtime.devices import together
from ctr_optim.settings import Settings
from ctr_optim.trust_region.logits import kl_divergence
from ctr_optim.trust_region.probe import Probe
from ctr_optim.trust_region.region import SLOPE_EXPONENT, adapted_bound, alignment, scale_within
from ctr_optim.trust_region.rerun import moved

Steps = Mapping[Stack, Tensor]

_COUPLING_GUESS = 40.0  # where the first measurement starts from; language models were seen between 10 and 400
_BASE_EVERY = 4  # measurements; the way from the base model is only told to the user
_LEAST_MOVE = 1e-3  # nats per token; below, logits in half precision would measure their own rounding
_NEWEST = 0.2  # least weight of a measurement among those before it: single ones are off by a third


def initial_shared(settings: Settings) -> dict[str, Any]:
    """Numbers of the trust region that a checkpoint carries."""
    return {
        "coupling": None,
        "alignment": None,
        "base_coupling": None,
        "calibrations": 0,
        "max_kl": settings.max_kl,
    }


class TrustRegion:
    """Holds a step within a bound on the KL per token between the model before and after it.

    It owns no state that a checkpoint needs: ``shared``, passed in, lives in the optimizer's first group.
    """

    def __init__(self, settings: Settings, probe: Probe | None, taps: Taps) -> None:
        self.settings, self.probe, self.taps = settings, probe, taps
        self.predicted: Tensor | float = 0.0
        self.scale: Tensor | float = 1.0
        self.slope: Tensor | float = 0.0
        self.kappa: Tensor | float | None = None
        self.bound: float | None = None

    def constrain(
        self,
        deltas: Steps,
        q: Tensor,
        slope: Tensor,
        blocks: Sequence[Block],
        groups: Sequence[dict[str, Any]],
        shared: dict[str, Any],
    ) -> Tensor:
        """``()`` the factor to multiply the whole step by, so that its predicted KL stays within the bound.

        Args:
            deltas: the step.
            q: ``()`` its quadratic form in the metric of choice.
            slope: ``()`` the loss's derivative along it.
            blocks: LoRA pairs with factors, for the KL from the base model.
            groups: the parameter groups, for the schedule of the bound.
            shared: the optimizer's numbers, changed here.
        """
        self.bound = self._bound_now(groups, shared)
        if self.probe is not None and self.probe.enabled and distributed.everywhere(self.probe.ready, q):
            self._calibrate(deltas, blocks, q, slope, shared)
        self.slope, self.kappa = slope, self.coupling(shared)
        if shared["alignment"] is not None:
            self.kappa = self.kappa * alignment(slope, q, shared["alignment"])
        predicted = 0.5 * self.kappa * q
        scale = torch.ones_like(predicted) if self.bound is None else scale_within(predicted, self.bound)
        self.predicted, self.scale = torch.where(scale > 0, predicted * scale.square(), 0), scale
        return scale

    def coupling(self, shared: dict[str, Any]) -> float:
        """kappa of a usual step, the factor between the block-diagonal metric and the model's own."""
        if self.settings.calibration_interval is None:
            return 1.0
        return shared["coupling"] or _COUPLING_GUESS

    def source(self, shared: dict[str, Any]) -> str:
        """Where the coupling comes from."""
        if self.settings.calibration_interval is None:
            return "block-diagonal"
        if shared["coupling"] is not None:
            return "measured"
        refused = self.probe.refused if self.probe is not None else "no single model holds all the layers"
        return f"assumed ({refused or 'not measured yet'})"

    def _bound_now(self, groups: Sequence[dict], shared: dict[str, Any]) -> float | None:
        """The bound of this step in nats per token; with ``kl_schedule="lr"`` it follows ``(lr / peak lr)^2``.

        The peak is the largest of the learning rates seen and the ``initial_lr`` that schedulers leave in a group.
        """
        ratio = 0.0
        for group in groups:
            lr = float(group["lr"])
            group["peak_lr"] = max(group.get("peak_lr", 0.0), float(group.get("initial_lr", 0.0)), lr)
            ratio = max(ratio, lr / group["peak_lr"] if group["peak_lr"] > 0 else 0.0)
        bound: float | None = shared["max_kl"]
        if bound is None:
            return None
        return bound * ratio**2 if self.settings.kl_schedule == "lr" else bound

    # -- calibration --------------------------------------------------------------------------------------------

    def _calibrate(
        self, deltas: Steps, blocks: Sequence[Block], q: Tensor, slope: Tensor, shared: dict[str, Any]
    ) -> None:
        """Measure the coupling along this step, at about the length that the step will have.

        Measurements are averaged by their square roots, since one in a hundred is off by a factor of ten. What this
        step's slope explains (:func:`alignment`) is taken out before, and what is usual moves with the average.
        """
        newest = max(_NEWEST, 5 / (5 + shared["calibrations"]))  # the first counts least: models change fastest then
        typical, usual = slope.square() / q, shared["alignment"]
        aligned = torch.where(typical > 0, alignment(slope, q, usual or typical), 1.0)
        found = self._measure(deltas, q, self.coupling(shared) * aligned, tries=1 if shared["calibrations"] else 3)
        if found is None:
            return
        coupling, here = found
        shared["coupling"] = _mixed(shared["coupling"], coupling / float(aligned), newest)
        now = float(typical)
        if now > 0:
            usual = usual or now
            shared["alignment"] = usual ** (1 - newest) * now**newest
            # the coupling of a usual step: it follows what is usual
            shared["coupling"] *= (shared["alignment"] / usual) ** SLOPE_EXPONENT
        shared["calibrations"] += 1
        if shared["base_coupling"] is None or shared["calibrations"] % _BASE_EVERY == 0:
            self._calibrate_base(here, blocks, shared)

    def _measure(self, deltas: Steps, q: Tensor, guess: Tensor, tries: int) -> tuple[float, Tensor | None] | None:
        """The coupling along a step, and the logits before it; None where none can be had.

        Until it is known, nothing waits for the device: the pass is short, and it should not run out of work.

        Args:
            guess: ``()`` of the coupling; the model is pushed about as far as the step will go if it is right.
            tries: where it was off by more than a factor of two, push again.
        """
        assert self.probe is not None
        target = max(self.bound or 0.0, _LEAST_MOVE)
        changes = [stack.parts(delta) for stack, delta in deltas.items()]
        with self.taps.paused():
            here = self.probe.logits_in_training()
        for _ in range(tries):
            # no further than the step itself goes, or the least move: a model that cannot reach the target would look
            # flatter the further one pushes it
            unit = (2 / (guess * q)).sqrt()  # where the KL would be 1
            epsilon = torch.minimum(unit * target**0.5, (unit * _LEAST_MOVE**0.5).clamp_min(1.0)).nan_to_num(0.0, 0.0)
            with self.taps.paused(), moved(changes, epsilon):
                there = self.probe.logits()
            measured = distributed.mean(self._kl(here, there), q)
            found = measured / (0.5 * epsilon.square() * q)
            coupling, off = torch.stack([found, found / guess]).tolist()
            if not (math.isfinite(coupling) and coupling > 0):
                return None
            if 0.5 < off < 2:
                break
            guess = found
        return coupling, here

    def _kl(self, here: Tensor | None, there: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Summed over loss tokens, and their number; None in a process that has nothing to compare."""
        assert self.probe is not None
        if here is None or there is None:
            return None
        if here.shape != there.shape:
            self.probe.refused = "the model's logits have another shape for a part of the batch"
            return None
        return kl_divergence(here, there, self.probe.loss_tokens(here))

    def _calibrate_base(self, here: Tensor | None, blocks: Sequence[Block], shared: dict[str, Any]) -> None:
        """Measure the KL from the base model (B = 0), and with it the coupling of the whole adapter."""
        assert self.probe is not None
        total = float(together([block.kl_from_base().sum() for block in blocks]).sum()) if blocks else 0.0
        if not total > 0:
            return
        b = [distributed.local(pair.B) for block in blocks for pair in block.pairs]
        with self.taps.paused(), moved([(b, None)]):
            base = self.probe.logits()
        shared["base_coupling"] = float(distributed.mean(self._kl(here, base), blocks[0].H)) / total

    # -- the adaptive bound -------------------------------------------------------------------------------------

    def adapt(self, closure: Callable[[], Any], before: Any, deltas: Steps, shared: dict[str, Any]) -> None:
        """Compare the reduction that the quadratic model promised with the one that the closure shows."""
        if self.settings.max_kl is None:
            return
        promised = -float(self.scale) * float(self.slope) - float(self.predicted)
        sign = -1.0 if next(iter(deltas)).group["maximize"] else 1.0
        with self.taps.paused(), torch.enable_grad():
            after = closure()
        # every process saw its own share of the batch
        gained = torch.tensor(sign * (float(before) - float(after)), device=next(iter(deltas.values())).device)
        gain = float(gained / distributed.add_up([gained]))
        shared["max_kl"] = adapted_bound(shared["max_kl"], self.settings.max_kl, gain, promised)


def _mixed(before: float | None, new: float, weight: float) -> float:
    """Mean, as lengths, of what was known and what was measured, ``weight`` for the latter."""
    return new if before is None else ((1 - weight) * before**0.5 + weight * new**0.5) ** 2
