"""One step before it is taken: a delta for each stack, its length in the curvature's metric, and its slope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ctr_optim.direction.fused import Fused
from ctr_optim.direction.stack import Stack


@dataclass
class Step:
    """A step of all parameters.

    Attributes:
        deltas: ``(L, *shape)`` for each stack.
        fused: the part that Triton kernels take.
        q: ``()`` quadratic form in the curvature's metric; slope: ``()`` derivative of the loss along the step.
        bounded: whether the curvature gives the step a length.
        tokens: ``()`` loss tokens of the step; None where they are not known.
    """

    deltas: dict[Stack, Tensor]
    fused: Fused
    q: Tensor
    slope: Tensor
    bounded: bool
    tokens: Tensor | None = None

    def changes(self) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """The parameters that this process holds, and its delta for each."""
        return [stack.parts(delta) for stack, delta in self.deltas.items()]

    def take_(self, scale: Tensor | None) -> None:
        """``p <- p + scale delta`` (None: 1) for all parameters."""
        moved = self.fused.move_(self.deltas, scale) if scale is not None and self.fused.stacks else []
        for stack, delta in self.deltas.items():
            if stack not in moved:
                stack.move_(delta, scale)


def directions(
    stacks: Sequence[Stack], fused: Fused, finite: Tensor, penalties: Mapping[Any, Tensor]
) -> tuple[dict[Stack, Tensor], list[Tensor]]:
    """Return every stack's step before the trust region, and the form and slope of the kernels' part.

    Args:
        stacks: all parameters that train.
        fused: takes the stacks that its kernels support.
        finite: ``()`` whether the step is to be taken.
        penalties: gradients to add to those of the loss, by stack.
    """
    deltas, known = fused.directions(finite) if fused.stacks else ({}, None)
    rest = {stack: stack.direction(finite, penalties.get(stack)) for stack in stacks if stack not in deltas}
    deltas.update({stack: delta for stack, delta in rest.items() if delta is not None})
    return deltas, list(known or ())
