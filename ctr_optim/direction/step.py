"""A proposed step: a delta for each stack, its quadratic form in the curvature's metric, and its slope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ctr_optim.direction.fused import Fused
from ctr_optim.direction.stack import Stack


@dataclass
class Step:
    """A proposed step of all parameters, before the trust region scales it.

    Attributes:
        deltas: ``(L, *shape)`` for each stack.
        fused: moves the stacks that the Triton kernels support.
        q: ``()`` quadratic form in the curvature's metric.
        slope: ``()`` derivative of the minimized objective along the step.
        bounded: whether the curvature gives the step a length.
        tokens: ``()`` loss tokens of the last observed step; None if they are unknown.
    """

    deltas: dict[Stack, Tensor]
    fused: Fused
    q: Tensor
    slope: Tensor
    bounded: bool
    tokens: Tensor | None = None

    def changes(self) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """Return, for each stack, this process's parameter shards and their deltas."""
        return [stack.parts(delta) for stack, delta in self.deltas.items()]

    def take_(self, scale: Tensor | None) -> None:
        """Apply ``p <- p + scale delta`` to all parameters; ``scale=None`` means 1."""
        moved = self.fused.move_(self.deltas, scale) if scale is not None and self.fused.stacks else []
        for stack, delta in self.deltas.items():
            if stack not in moved:
                stack.move_(delta, scale)


def directions(
    stacks: Sequence[Stack], fused: Fused, finite: Tensor, penalties: Mapping[Any, Tensor]
) -> tuple[dict[Stack, Tensor], list[Tensor]]:
    """Return every stack's step before the trust region, and the quadratic form and slope of the kernels' part.

    Args:
        stacks: stacks of all trained parameters.
        fused: runs the stacks that the Triton kernels support.
        finite: ``()`` whether all gradients are finite; if not, all moments stay and the step is zero.
        penalties: gradients ``(L, *shape)`` that are added to the loss's gradients, by stack.

    Returns:
        The step ``(L, *shape)`` for each stack with gradients. The list holds form ``()`` and slope ``()`` of the
        kernels' stacks; it is empty if no kernel ran, or if one failed.
    """
    deltas, known = fused.directions(finite) if fused.stacks else ({}, None)
    rest = {stack: stack.direction(finite, penalties.get(stack)) for stack in stacks if stack not in deltas}
    deltas.update({stack: delta for stack, delta in rest.items() if delta is not None})
    return deltas, list(known or ())
