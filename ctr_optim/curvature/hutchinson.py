"""The second curvature proxy: the Hessian's diagonal, by Hutchinson's estimator.

``diag(H) = E[z * H z]`` for signs z (Hutchinson, 1990; AdaHessian, arXiv 2006.00719). The Hessian-vector product is a
central difference of gradients on a slice of the last batch, so it needs no double backward and works with every
attention kernel. It costs two backward passes per sample and ignores correlations between a layer's parameters; it
serves as a baseline for K-FAC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.curvature.base import Gradients, Stacked, StackedPair, State
from ctr_optim.curvature.defaults import CurvatureBase
from ctr_optim.curvature.gradient import terms as gradient_terms
from ctr_optim.model.pair import LoRAPair
from ctr_optim.runtime import distributed
from ctr_optim.runtime.displacement import Moved
from ctr_optim.settings import Settings, calibration_due

_INTERVAL = 50  # most steps between samples, where the coupling is not measured
_RADIUS = 1e-3  # of the difference, per coordinate: above float32's rounding, below the curvature's own scale


@dataclass(slots=True)
class HutchinsonState:
    """Numbers that a checkpoint carries: ``hessians``, samples so far."""

    hessians: int = 0


class Hutchinson(CurvatureBase):
    """The Hessian's diagonal of every parameter, sampled where the coupling is measured.

    Args:
        prober: gives gradients of the last batch's loss.
        decay: of the moving average of samples.
        interval: most steps between samples.
    """

    reruns = True

    def __init__(self, prober: Gradients | None, decay: float, interval: int | None) -> None:
        self.prober, self.decay, self.interval, self.state = prober, decay, interval, HutchinsonState()
        self._stacks: list[Stacked] = []
        self._step = 0

    @classmethod
    def build(cls, pairs: Sequence[LoRAPair], settings: Settings, prober: Gradients | None) -> Hutchinson:
        """Return the curvature of an optimizer."""
        return cls(prober, settings.factor_decay, settings.calibration_interval)

    @property
    def per_token(self) -> bool:  # type: ignore[override]
        """Whether there is a sample; until then gradients alone are the metric."""
        return bool(self.state.hessians > 0)

    def prepare(self, state: State, params: Sequence[nn.Parameter]) -> None:
        """Add the diagonal to the state of every parameter that trains."""
        for p in params:
            state[p].setdefault("hessian_diagonal", torch.zeros_like(state[p]["exp_avg"]))

    def bind(self, pairs: Sequence[StackedPair], others: Sequence[Stacked]) -> None:
        """Take new stacks."""
        self._stacks = [s for pair in pairs for s in (pair.a, pair.b) if s is not None] + list(others)

    def arm(self, step: int) -> None:
        """Have the batch kept where a sample is due; remember the step, which seeds the signs."""
        self._step = step
        if self.prober is not None:
            self.prober.enabled = calibration_due(step, self.interval or _INTERVAL)

    def update(self, finite: Tensor, agreed: Any) -> None:
        """Add one sample to the moving average of the diagonal, if this step kept its batch."""
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
        """Terms ``<delta, max(diag(H), 0) delta>``, one a stack; by gradients until there is a sample."""
        if not self.state.hessians:
            return gradient_terms(deltas)
        return [quadratic(stack, delta) for stack, delta in deltas.items()]

    def close(self) -> None:
        """Sample no more; the diagonals stay."""
        self.prober = None


@torch.no_grad()
def sample_diagonal(
    stacks: Sequence[Stacked], gradients: Callable[[list[Tensor]], list[Tensor]], seed: int
) -> list[Tensor]:
    """One sample ``z * H z`` for each stack, ``(L, *shape)``.

    Args:
        gradients: gradients of the loss for a list of parameters, where they stand.
        seed: of the signs; the same on every process.
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
    """Bias-corrected moving average of the samples, in the stack's state; samples that are not finite are left out."""
    weight = (1 - decay) / (1 - decay**updates)
    diagonal = stack.tensors["hessian_diagonal"]
    diagonal.lerp_(torch.where(torch.isfinite(sample), sample, diagonal), weight)


def quadratic(stack: Stacked, delta: Tensor) -> Tensor:
    """``()`` the form ``<delta, max(diag(H), 0) delta>`` of a stack's step."""
    return (delta.square() * stack.tensors["hessian_diagonal"].clamp_min(0)).sum()
