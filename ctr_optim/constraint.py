"""The trust region at work: predict how far a step moves the model, measure it now and then, and hold the bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctr_optim import distributed
from ctr_optim.calibration import Probe, gauss_newton_kl, kl_divergence, moved
from ctr_optim.curvature.blocks import Block
from ctr_optim.curvature.capture import Taps
from ctr_optim.precondition import Stack
from ctr_optim.settings import Settings
from ctr_optim.trust_region import adapted_bound, scale_within

Steps = Mapping[Stack, Tensor]

_COUPLING_GUESS = 30.0  # where the first measurement starts from; language models were seen between 10 and 400


def initial_shared(settings: Settings) -> dict[str, Any]:
    """Numbers of the trust region that a checkpoint carries."""
    return {"coupling": None, "base_coupling": None, "calibrations": 0, "max_kl": settings.max_kl}


class TrustRegion:
    """Holds a step within a bound on the KL per token between the model before and after it.

    It owns no state that a checkpoint needs: ``shared``, passed in, lives in the optimizer's first group.
    """

    def __init__(self, settings: Settings, probe: Probe | None, taps: Taps) -> None:
        self.settings, self.probe, self.taps = settings, probe, taps
        self.predicted: Tensor | float = 0.0
        self.scale: Tensor | float = 1.0
        self.bound: float | None = None

    def constrain(
        self,
        deltas: Steps,
        q: Tensor,
        blocks: Sequence[Block],
        groups: Sequence[dict[str, Any]],
        shared: dict[str, Any],
    ) -> Tensor:
        """``()`` the factor to multiply the whole step by, so that its predicted KL stays within the bound.

        Args:
            deltas: the step.
            q: ``()`` its quadratic form in the metric of choice.
            blocks: LoRA pairs with factors, for the KL from the base model.
            groups: the parameter groups, for the schedule of the bound.
            shared: the optimizer's numbers, changed here.
        """
        self.bound = self._bound_now(groups, shared)
        if self.probe is not None and self.probe.enabled and distributed.everywhere(self.probe.ready, q):
            self._calibrate(deltas, blocks, q, shared)
        predicted = 0.5 * self.coupling(shared) * q
        scale = torch.ones_like(predicted) if self.bound is None else scale_within(predicted, self.bound)
        self.predicted, self.scale = torch.where(scale > 0, predicted * scale.square(), 0), scale
        return scale

    def coupling(self, shared: dict[str, Any]) -> float:
        """kappa, the factor between the block-diagonal metric and the model's own."""
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

    def _calibrate(self, deltas: Steps, blocks: Sequence[Block], q: Tensor, shared: dict[str, Any]) -> None:
        """Measure the coupling along this step, at about the length that the step will have."""
        form = float(q)
        if not (math.isfinite(form) and form > 0):
            return
        target, guess, first = max(self.bound or 0.0, 1e-4), self.coupling(shared), shared["coupling"] is None
        for _ in range(3 if first else 1):
            # no further than the step itself goes (or a trace of a move): a model that cannot reach the target would
            # look flatter the further one pushes it
            epsilon = min(math.sqrt(2 * target / (guess * form)), max(1.0, math.sqrt(2e-4 / (guess * form))))
            logits = self._logits_along(deltas, epsilon)
            measured = distributed.mean(gauss_newton_kl(*logits) if logits else None, q)
            coupling = measured / (0.5 * epsilon**2 * form)
            if not (math.isfinite(coupling) and coupling > 0):
                return
            close, guess = 0.5 < coupling / guess < 2, coupling
            if close:
                break
        # the slice is small: the geometric mean with the last value halves its noise
        shared["coupling"] = coupling if first else math.sqrt(coupling * shared["coupling"])
        shared["calibrations"] += 1
        if shared["base_coupling"] is None or _measures_base(shared["calibrations"]):
            self._calibrate_base(logits, blocks, shared)

    def _logits_along(self, deltas: Steps, epsilon: float) -> tuple[Tensor, Tensor] | None:
        assert self.probe is not None
        changes = [stack.parts(delta) for stack, delta in deltas.items()]
        logits = []
        for sign in (1.0, -1.0):
            with self.taps.paused(), moved(changes, sign * epsilon):
                logits.append(self.probe.logits())
        return None if logits[0] is None or logits[1] is None else (logits[0], logits[1])

    def _calibrate_base(
        self, logits: tuple[Tensor, Tensor] | None, blocks: Sequence[Block], shared: dict[str, Any]
    ) -> None:
        """Measure the KL from the base model (B = 0), and with it the coupling of the whole adapter."""
        assert self.probe is not None
        total = float(sum(block.kl_from_base().sum() for block in blocks))
        if not total > 0:
            return
        b = [distributed.local(pair.B) for block in blocks for pair in block.pairs]
        with self.taps.paused(), moved([(b, None)]):
            base = self.probe.logits()
        here = None if logits is None or base is None else kl_divergence((logits[0] + logits[1]) / 2, base)
        shared["base_coupling"] = distributed.mean(here, blocks[0].H) / total

    # -- the adaptive bound -------------------------------------------------------------------------------------

    def adapt(self, closure: Callable[[], Any], before: Any, deltas: Steps, shared: dict[str, Any]) -> None:
        """Compare the reduction that the quadratic model promised with the one that the closure shows."""
        if self.settings.max_kl is None:
            return
        promised, sign = -float(self.predicted), 1.0
        for stack, delta in deltas.items():
            sign = -1.0 if stack.group["maximize"] else 1.0
            parts = zip(stack.params, *stack.parts(delta), strict=True)
            slopes = [(distributed.local(p.grad) * part).sum() for p, _, part in parts if p.grad is not None]
            slope = distributed.sum_over_parts(torch.stack(slopes).sum(), stack.params[0])
            promised -= sign * float(self.scale) * float(slope)
        with self.taps.paused(), torch.enable_grad():
            after = closure()
        # every process saw its own share of the batch
        gained = torch.tensor(sign * (float(before) - float(after)), device=slopes[0].device)
        gain = float(gained / distributed.add_up([gained]))
        shared["max_kl"] = adapted_bound(shared["max_kl"], self.settings.max_kl, gain, promised)


def _measures_base(calibrations: int) -> bool:
    """The way from the base model is only told to the user: once it is long, every fourth measurement will do."""
    return calibrations <= 8 or calibrations % 4 == 0
