"""Steps along the boundary of the budget: remove the part of a step that would leave the budget, to first order.

Let g be the gradient of ``KL(base || model)`` on the measured tokens, and P the preconditioner of the step (for Adam,
``sqrt(v^) + eps`` in its coordinates, divided by the learning rate). A step s changes the KL by ``<g, s>`` to first
order. If this exceeds the room r, the nearest step in the norm ``<x, P x>`` that keeps within it is

    s' = s - c P^-1 g,    c = (<g, s> - r) / <g, P^-1 g>

Since s is ``-P^-1 m`` with the average gradient m of the loss, s' is the step for ``m + c g``: c is the multiplier of
the bound on the KL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ctr_optim.runtime.devices import together

GRADIENT = "budget_gradient"  # key in the state of A and B: g, in the shape of the parameter

State = Mapping[Any, dict[str, Tensor]]


class Stacked(Protocol):
    """L parameters of one shape."""

    @property
    def params(self) -> Sequence[Tensor]: ...

    def live(self, finite: Tensor) -> Tensor:
        """Return ``(L,)``: 1 for each parameter that this step moves, else 0."""

    def preconditioned(self, grad: Tensor) -> Tensor:
        """Return ``P^-1 g (L, *shape)`` for a gradient g ``(L, *shape)``."""


S = TypeVar("S", bound=Stacked)


def excess(along: Tensor, room: Tensor | float, square: Tensor) -> Tensor:
    """Return ``()`` the multiplier c of a step; 0 if the step keeps within the room.

    Args:
        along: ``()`` first-order change of the KL along the step, ``<g, s>``.
        room: largest change; a negative room calls for a step back.
        square: ``()`` ``<g, P^-1 g>``.
    """
    return torch.where(square > 0, (along - room).clamp_min(0) / square.clamp_min(torch.finfo(square.dtype).tiny), 0)


def projected(
    deltas: Mapping[S, Tensor], gradients: Mapping[S, Tensor], room: Tensor | float, finite: Tensor
) -> tuple[dict[S, Tensor], Tensor]:
    """Return the nearest step whose first-order change of the KL is at most ``room``, and this change ``()``.

    Args:
        deltas: the step, ``(L, *shape)`` for each stack.
        gradients: g, ``(L, *shape)`` for each stack.
        room: largest change of the KL, in nats per token.
        finite: ``()`` whether all gradients of the loss are finite; if not, nothing moves.
    """
    back = {stack: stack.preconditioned(g) * stack.live(finite)[:, None, None].to(g) for stack, g in gradients.items()}
    along = together([_dot(g, deltas[stack]) for stack, g in gradients.items()]).sum()
    square = together([_dot(g, back[stack]) for stack, g in gradients.items()]).sum()
    c = excess(along, room, square)
    moved = {stack: delta - back[stack] * c.to(delta) if stack in back else delta for stack, delta in deltas.items()}
    return moved, along - c * square


def stacked(deltas: Mapping[S, Tensor], state: State) -> dict[S, Tensor] | None:
    """Return the stored g ``(L, *shape)`` of every stack of a step, like the step; None if a parameter has none."""
    found = {}
    for stack, delta in deltas.items():
        parts = [g for p in stack.params if (g := state[p].get(GRADIENT)) is not None]
        if len(parts) < len(stack.params):
            return None
        found[stack] = torch.stack(parts).to(delta)
    return found


def store(gradients: Mapping[Any, Tensor], state: State, weight: float) -> bool:
    """Add a new gradient to the stored average; return False, and change nothing, if it is not finite.

    Args:
        gradients: gradient by parameter; parameters without optimizer state are left out.
        state: the optimizer's state.
        weight: weight of the new gradient in the average; 1 replaces the stored one.
    """
    if not all(bool(torch.isfinite(g).all()) for g in gradients.values()):
        return False
    for p, g in gradients.items():
        if not state.get(p):  # state[p] would add an entry, which state_dict() cannot save.
            continue
        if weight < 1 and GRADIENT in state[p]:
            state[p][GRADIENT].lerp_(g, weight)
        else:
            state[p][GRADIENT] = g.clone()
    return True


def forget(state: State) -> None:
    """Remove g from the state of all parameters."""
    for entry in state.values():
        entry.pop(GRADIENT, None)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(x.flatten(), y.to(x).flatten())
    return product
