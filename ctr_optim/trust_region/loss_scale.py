"""The scale of the loss, observed at the logits, so that the predicted KL of a step does not depend on it.

The slope and the output-gradient factors are derivatives of the loss. The KL of a displacement depends only on the
model. If weights, rewards or the division of an uneven accumulation multiply one batch's loss by c, its slope is c
times as large, and the factors keep c^2 for many steps. The scale s of a step has both effects::

    s^2 = N sum_i |d loss / d logits_i|^2 / world^2        for N loss tokens over micro-batches and processes

For a mean cross-entropy with the weight w, s is w times the root mean square of ``|p - y|``. The factors average
``G / s^2``, times the average of s^2, which keeps their units. The coupling uses the form q divided by the average of
s^2, and the slope divided by the step's own s. Both are relative to the first s, so that a coupling keeps its meaning.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ctr_optim.runtime import distributed
from ctr_optim.runtime.amp import grad_scale
from ctr_optim.trust_region.logits import Logits, unviewed
from ctr_optim.trust_region.protocols import Changes, Step


@dataclass(slots=True)
class LossScaleState:
    """Checkpoint numbers of the loss scale.

    Attributes:
        loss_scale: average of s^2 in the factors; 0 until observed.
        loss_scale_unit: first s^2; 0 until observed.
    """

    loss_scale: float = 0.0
    loss_scale_unit: float = 0.0


@dataclass(frozen=True)
class Relative:
    """A step whose form and slope are relative to the loss scale.

    Attributes:
        step: the step in the units of its loss.
        form, gradient: ``()`` factors of the form and of the slope.
    """

    step: Step
    form: Tensor
    gradient: Tensor

    @property
    def q(self) -> Tensor:
        """``()`` quadratic form of the step with factors at the unit of the loss scale."""
        return self.step.q * self.form

    @property
    def slope(self) -> Tensor:
        """``()`` derivative of the loss along the step, at the unit of the loss scale."""
        return self.step.slope * self.gradient

    @property
    def tokens(self) -> Tensor | None:
        """``()`` number of loss tokens of the step; None if unknown."""
        return self.step.tokens

    def changes(self) -> Changes:
        """Return the parameters that the step changes, and the change of each."""
        return self.step.changes()


class LossScale:
    """Observes the gradients of the logits, and averages their scale.

    Attributes:
        state: checkpoint numbers; current after :meth:`settle`.
    """

    def __init__(self) -> None:
        self.state = LossScaleState()
        self._sums: dict[int, Tensor] = {}  # by depth of the module: sum of squares, number of tokens
        self._hooked: list[weakref.ref[Tensor]] = []
        self._average: Tensor | None = None  # of s^2 in the factors
        self._unit: Tensor | None = None  # first s^2
        self._now: Tensor | None = None  # s^2 of this step

    def see(self, depth: int, logits: Logits) -> None:
        """Hook the gradient of a forward pass's logits.

        Args:
            depth: depth of the module that returned them; only the outermost logits with a gradient count.
            logits: the logits. A wrapper often returns the same tensors as the module inside, which are hooked once.
        """
        compiling = torch.compiler.is_compiling()  # A compiled graph supports no weak references.
        before = [] if compiling else [ref() for ref in self._hooked]
        scale = self

        def seen(depth: int, grad: Tensor | None) -> None:  # A compiled graph accepts a function, not a bound method.
            scale._seen(depth, grad)

        chunks = [unviewed(chunk) for chunk in logits.chunks]
        for chunk in chunks:
            if chunk.requires_grad and not any(chunk is other for other in before):
                chunk.register_hook(partial(seen, depth))  # type: ignore[no-untyped-call]
        self._hooked = [] if compiling else [weakref.ref(chunk) for chunk in chunks]

    def _seen(self, depth: int, grad: Tensor | None) -> None:
        if grad is None:
            return
        found, before = squares(grad.detach()), self._sums.get(depth)
        self._sums[depth] = found if before is None else before + found.to(before)

    @property
    def observing(self) -> bool:
        """Whether gradients were observed since the last step."""
        return bool(self._sums)

    def forget(self, unless: Tensor | None = None) -> None:
        """Drop the observed gradients, because the gradients of the parameters were cleared.

        Args:
            unless: ``()`` condition on the device; if it is true, the observed gradients stay.
        """
        kept = {} if unless is None else self._sums
        self._sums = {depth: torch.where(unless.to(sums.device), sums, 0) for depth, sums in kept.items()}  # type: ignore

    def observe(self, like: Tensor) -> None:
        """Read the scale of this step. All processes must call this method.

        A step without observed logits, or with gradients that are not finite, has the average scale.

        Args:
            like: tensor with the dtype of the scale, on the device of collective communication.
        """
        total = like.new_zeros(2)
        for depth in sorted(self._sums, reverse=True):  # The outermost module comes last.
            sums = self._sums[depth].to(like)
            total = torch.where(sums[1] > 0, sums, total)
        self.forget()
        world = distributed.add_up([total])
        squared = total.prod() / (world * grad_scale(total)) ** 2
        observed = torch.isfinite(squared) & (squared > 0)
        if self._average is None or self._unit is None:
            numbers = (self.state.loss_scale, self.state.loss_scale_unit)
            self._average, self._unit = (torch.tensor(x, dtype=like.dtype, device=like.device) for x in numbers)
        average, unit = self._average.to(like), self._unit.to(like)
        first = observed & (unit == 0)
        self._average, self._unit = torch.where(first, squared, average), torch.where(first, squared, unit)
        self._now = torch.where(observed, squared, self._average)

    def add(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Add this step's s^2 to the average, and return the factors that make averages of squared gradients follow.

        With ``E <- kept E + weight (new G - kept E)``, E stays the average of ``G / s^2`` times the average of s^2.

        Args:
            weight: ``()`` weight of the newest sample in the averages.

        Returns:
            ``()`` factor ``kept`` of the former averages, ``()`` factor ``new`` of the squared gradients; both 1 before
            the first observation.
        """
        assert self._average is not None and self._now is not None
        before = self._average
        self._average = before.lerp(self._now, weight.to(before))
        return _ratio(self._average, before), _ratio(self._average, self._now)

    @property
    def form(self) -> Tensor:
        """``()`` factor of the form that makes it relative to the loss scale."""
        assert self._average is not None and self._unit is not None
        return _ratio(self._unit, self._average)

    def relative(self, step: Step) -> Relative:
        """Return the step relative to the loss scale. The metric's averages must have used :meth:`add`."""
        assert self._unit is not None and self._now is not None
        return Relative(step, self.form.to(step.q), _ratio(self._unit, self._now).sqrt().to(step.q))

    def settle(self) -> None:
        """Update :attr:`state` from the device; waits for the device."""
        if self._average is not None and self._unit is not None:
            self.state = LossScaleState(float(self._average), float(self._unit))

    def resume(self) -> None:
        """Continue from the numbers loaded into :attr:`state`."""
        self._average = self._unit = self._now = None


def squares(grad: Tensor) -> Tensor:
    """Return ``(2,)`` the sum of squares of a gradient ``(..., V)``, and the number of rows that are not zero.

    At least in float32. The norm of each row needs no copy of the gradient in the wider dtype.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    norms = torch.linalg.vector_norm(grad, dim=-1, dtype=wide)
    return torch.stack([norms.square().sum(), (norms > 0).sum(dtype=wide)])


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return the ratio of two scales; 1 while they are 0, which means unknown."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1), 1)
