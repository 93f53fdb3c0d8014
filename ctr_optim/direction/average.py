"""The running average of the trained weights, and its exchange with the training weights.

At a constant learning rate the weights move around an optimum. Their average over the last part of a run lies closer to
it than any of them (Polyak and Juditsky 1992), so that a run needs no schedule, and no number of steps in advance.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.runtime import distributed

AVERAGE = "average"  # key in a parameter's state: the average, at least float32
TRAINING = "training"  # key in a parameter's state: the training weights while the parameter holds the average
# Weight of the newest of t weights: REACH / t. The average reaches back over about the last fifth of the steps. On
# SmolLM2-135M, 5 and 10 were level, and 2.5 was worse.
REACH = 5.0

State = MutableMapping[Any, dict[str, Tensor]]


@dataclass(slots=True)
class AverageState:
    """Checkpoint numbers of the average.

    Attributes:
        averaged_steps: number of steps in the average.
    """

    averaged_steps: int = 0


class Average:
    """Running average of the trained weights.

    Attributes:
        state: checkpoint numbers.
        loaded: whether a checkpoint was loaded that was saved while the parameters held the average. Its training
            weights return before the next training forward pass.
    """

    def __init__(self) -> None:
        self.state = AverageState()
        self.loaded = False

    @classmethod
    def of(cls, wanted: object) -> Average | None:
        """Return an average if it is wanted.

        Raises:
            TypeError: if the option is not a bool.
        """
        if not isinstance(wanted, bool):
            raise TypeError(f"average: got {wanted!r} of type {type(wanted).__name__}, expected True or False")
        return cls() if wanted else None

    def add(self, params: Sequence[nn.Parameter], state: State) -> None:
        """Add the weights after a step.

        Args:
            params: the optimizer's parameters.
            state: the optimizer's state, which stores the averages.
        """
        self.state.averaged_steps += 1
        means, weights = [], []
        for p, entry in _trained(params, state):
            weight = distributed.local(p.detach())
            if AVERAGE not in entry:
                entry[AVERAGE] = p.detach().to(_wide(p), copy=True)
            means.append(distributed.local(entry[AVERAGE]))
            weights.append(weight.to(means[-1].dtype))
        if means:
            torch._foreach_lerp_(means, weights, newest_weight(self.state.averaged_steps))

    def in_use(self, params: Sequence[nn.Parameter], state: State) -> bool:
        """Return whether the parameters hold the average."""
        return any(TRAINING in entry for _, entry in _trained(params, state))

    def enter(self, params: Sequence[nn.Parameter], state: State) -> None:
        """Replace the training weights by the average, and store them. A parameter without an average stays."""
        for p, entry in _trained(params, state):
            if AVERAGE in entry and TRAINING not in entry:
                entry[TRAINING] = p.detach().clone()
                distributed.local(p.detach()).copy_(distributed.local(entry[AVERAGE]))

    def leave(self, params: Sequence[nn.Parameter], state: State) -> None:
        """Restore the training weights, bit for bit."""
        self.loaded = False
        for p, entry in _trained(params, state):
            if TRAINING in entry:
                distributed.local(p.detach()).copy_(distributed.local(entry.pop(TRAINING)))

    def keep(self, params: Sequence[nn.Parameter], state: State) -> None:
        """Keep the parameters as they are, and drop the stored training weights."""
        self.loaded = False
        for _, entry in _trained(params, state):
            entry.pop(TRAINING, None)

    def forget(self, state: State) -> None:
        """Start the average again: a rank event changed the shapes of the parameters."""
        self.state.averaged_steps = 0
        for entry in state.values():
            entry.pop(AVERAGE, None)


def drop_averages(state: State) -> None:
    """Remove the averages of a checkpoint, for an optimizer that keeps none.

    Raises:
        ValueError: if the checkpoint was saved while the parameters held the average.
    """
    for entry in state.values():
        entry.pop(AVERAGE, None)
        if TRAINING in entry:
            raise ValueError(
                "checkpoint: it was saved while the parameters held the average of the weights; build the optimizer "
                "with average=True to load it"
            )


def newest_weight(count: int) -> float:
    """Return the weight of the newest weights in an average of ``count`` weights."""
    return min(1.0, REACH / count)


def _trained(params: Sequence[nn.Parameter], state: State) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
    """Yield the trained parameters that have optimizer state, with their state."""
    for p in params:
        if p.requires_grad and (entry := state.get(p)):
            yield p, entry


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
