"""The Hessian's diagonal by Hutchinson's estimator, as a baseline for K-FAC.

``diag(H) = E[z * H z]`` for random signs z (Hutchinson, 1990; AdaHessian, arXiv 2006.00719). H is the Hessian in this
module. The Hessian-vector product is a central difference of gradients on a slice of the last batch. Therefore it needs
no double backward pass and works with every attention kernel. Each sample costs two forward and backward passes. The
diagonal ignores correlations between parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.curvature.base import Gradients, LossScale, Stacked, StackedPair, State
from ctr_optim.curvature.defaults import CurvatureBase
from ctr_optim.curvature.gradient import terms as gradient_terms
from ctr_optim.model.pair import LoRAPair
from ctr_optim.runtime import distributed
from ctr_optim.runtime.displacement import Moved
from ctr_optim.settings import Settings, calibration_due

_INTERVAL = 50  # most steps between samples if the coupling is not measured
_RADIUS = 1e-3  # finite-difference radius per coordinate: above float32 rounding, below the scale of the curvature


@dataclass(slots=True)
class HutchinsonState:
    """Numbers that a checkpoint carries: ``hessians``, the number of samples so far."""

    hessians: int = 0


class Hutchinson(CurvatureBase):
    """The Hessian's diagonal for every parameter, sampled at the steps at which the coupling is measured.

    Args:
        prober: returns gradients of the last batch's loss; None for no samples.
        decay: decay of the moving average over samples.
        interval: most steps between samples; None for the default.
    """

    reruns = True

    def __init__(self, prober: Gradients | None, decay: float, interval: int | None) -> None:
        self.prober, self.decay, self.interval, self.state = prober, decay, interval, HutchinsonState()
        self._stacks: list[Stacked] = []
        self._step = 0

    @classmethod
    def build(cls, pairs: Sequence[LoRAPair], settings: Settings, prober: Gradients | None) -> Hutchinson:
        """Return the curvature of an optimizer; the arguments are those of ``CurvatureBase.build``."""
        return cls(prober, settings.factor_decay, settings.calibration_interval)

    @property
    def per_token(self) -> bool:  # type: ignore[override]
        """Whether there is a sample. Before the first sample, the metric comes from gradients alone."""
        return bool(self.state.hessians > 0)

    def prepare(self, state: State, params: Sequence[nn.Parameter]) -> None:
        """Add a zero diagonal to the state of every parameter in ``params`` that has none."""
        for p in params:
            state[p].setdefault("hessian_diagonal", torch.zeros_like(state[p]["exp_avg"]))

    def bind(self, pairs: Sequence[StackedPair], others: Sequence[Stacked]) -> None:
        """Use new stacks."""
        self._stacks = [s for pair in pairs for s in (pair.a, pair.b) if s is not None] + list(others)

    def arm(self, step: int) -> None:
        """Make the prober keep the batch if a sample is due, and store the step, which seeds the signs."""
        self._step = step
        if self.prober is not None:
            self.prober.enabled = calibration_due(step, self.interval or _INTERVAL)

    def update(self, finite: Tensor, agreed: Any, loss_scale: LossScale | None = None) -> None:
        """Add one sample to the moving average of the diagonal if the prober kept this step's batch."""
        if self.prober is None or not self.prober.enabled or not distributed.everywhere(self.prober.ready, finite):
            return
        stacks = [s for s in self._stacks if any(p.grad is not None for p in s.params)]
        samples = self.prober.sampled(partial(sample_diagonal, stacks, self.prober.gradients, self._step))
        if samples is None:
            return
        world = distributed.add_up(samples)
        self.state.hessians += 1
        for stack, one in zip(stacks, samples, strict=True):
            update_diagonal_(stack, one / world, self.decay, self.state.hessians)

    def quadratic(self, deltas: Mapping[Any, Tensor], done: Iterable[Any]) -> list[Tensor]:
        """Return one term ``<delta, max(diag(H), 0) delta>`` for each stack; terms from gradients without a sample."""
        if not self.state.hessians:
            return gradient_terms(deltas)
        return [quadratic(stack, delta) for stack, delta in deltas.items()]

    def close(self) -> None:
        """Stop sampling; the diagonals stay."""
        self.prober = None


@torch.no_grad()
def sample_diagonal(
    stacks: Sequence[Stacked], gradients: Callable[[list[Tensor]], list[Tensor]], seed: int
) -> list[Tensor]:
    """Return one sample ``z * H z (L, *shape)`` for each stack.

    Args:
        stacks: the parameters.
        gradients: returns the loss's gradients for a list of parameters at their current values.
        seed: seed of the signs z, equal in every process.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = []
    for stack in stacks:
        shape = stack.tensors["exp_avg"].shape
        z = torch.randint(0, 2, shape, generator=generator, device="cpu").mul_(2).sub_(1)
        signs.append(z.to(stack.tensors["exp_avg"]))
    params: list[Tensor] = [p for stack in stacks for p in stack.params]
    changes = [(list(stack.params), list(z.unbind(0))) for stack, z in zip(stacks, signs, strict=True)]
    ends = []
    for radius in (_RADIUS, -_RADIUS):
        with Moved(changes, radius):
            ends.append(gradients(params))
    products = iter([(plus - minus) / (2 * _RADIUS) for plus, minus in zip(*ends, strict=True)])
    return [
        z * torch.stack([next(products).to(z) for _ in stack.params]) for stack, z in zip(stacks, signs, strict=True)
    ]


def update_diagonal_(stack: Stacked, sample: Tensor, decay: float, updates: int) -> None:
    """Add a sample to the bias-corrected moving average of the diagonal in the stack's state, in place.

    Args:
        stack: the parameters.
        sample: ``(L, *shape)``; entries that are not finite are ignored.
        decay: decay of the moving average.
        updates: number of samples, this one included.
    """
    weight = (1 - decay) / (1 - decay**updates)
    diagonal = stack.tensors["hessian_diagonal"]
    diagonal.lerp_(torch.where(torch.isfinite(sample), sample, diagonal), weight)


def quadratic(stack: Stacked, delta: Tensor) -> Tensor:
    """Return ``()`` the form ``<delta, max(diag(H), 0) delta>`` of a stack's step ``(L, *shape)``."""
    return (delta.square() * stack.tensors["hessian_diagonal"].clamp_min(0)).sum()
