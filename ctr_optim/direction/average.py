"""The running average of the trained weights, and its exchange with the training weights.

At a constant learning rate the weights move around an optimum. Their average over the last part of a run lies closer to
it than any of them (Polyak and Juditsky 1992), so that a run needs no schedule, and no number of steps in advance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.runtime import distributed

# Key in a parameter's state: the average, at least float32; the training weights while the parameter holds the average.
AVERAGE = "average"
# Key in the state of half-precision parameters: the training weights while the average is in use. AVERAGE then stays,
# because the parameter holds it rounded. Both keys always exist, because torch.distributed.checkpoint loads only keys
# that the optimizer already has.
TRAINING = "training"
# Weight of the newest of t weights: REACH / t. The average reaches back over about the last fifth of the steps. On
# SmolLM2-135M, 5 and 10 were level, and 2.5 was worse.
REACH = 5.0

State = MutableMapping[Any, dict[str, Tensor]]


@dataclass(slots=True)
class AverageState:
    """Checkpoint numbers of the average.

    Attributes:
        averaged_steps: number of steps in the average.
        average_used: 1 while the parameters hold the average, else 0.
    """

    averaged_steps: int = 0
    average_used: int = 0


class Average:
    """Running average of the trained weights.

    Attributes:
        state: checkpoint numbers.
        loaded: whether the state is from a checkpoint or a copy made while the parameters held the average. The
            training weights return before the next training forward pass.
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

    @property
    def in_use(self) -> bool:
        """Whether the parameters hold the average."""
        return bool(self.state.average_used)

    def prepare(self, params: Sequence[nn.Parameter], state: State) -> None:
        """Add the tensors of the average to the state of parameters that lack them, before they are stacked."""
        for p in params:
            entry = state[p]
            if AVERAGE not in entry:
                entry[AVERAGE] = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            if entry[AVERAGE].dtype != p.dtype and TRAINING not in entry:
                entry[TRAINING] = p.detach().clone()

    def add(self, params: Sequence[nn.Parameter], state: State) -> None:
        """Add the weights after a step. A skipped step adds its unchanged weights.

        Args:
            params: the optimizer's parameters.
            state: the optimizer's state, which stores the averages.
        """
        self.state.averaged_steps += 1
        alike: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for weight, entry in _averaged(params, state):
            mean = distributed.local(entry[AVERAGE])
            means, weights = alike.setdefault(mean.device, ([], []))
            means.append(mean)
            weights.append(weight.to(mean.dtype))
        for means, weights in alike.values():
            torch._foreach_lerp_(means, weights, newest_weight(self.state.averaged_steps))

    def enter(self, params: Sequence[nn.Parameter], state: State) -> None:
        """Let the parameters hold the average, and the state the training weights. Without an average, both agree."""
        if self.in_use:
            return
        for weight, entry in _averaged(params, state):
            mean = distributed.local(entry[AVERAGE])
            if not self.state.averaged_steps:
                mean.copy_(weight)
            if TRAINING in entry:
                distributed.local(entry[TRAINING]).copy_(weight)
                weight.copy_(mean)
            else:
                _exchange(weight, mean)
        self.state.average_used = 1

    def leave(self, params: Sequence[nn.Parameter], state: State) -> None:
        """Let the parameters hold the training weights again, bit for bit."""
        self.loaded = False
        if not self.in_use:
            return
        for weight, entry in _averaged(params, state):
            if TRAINING in entry:
                weight.copy_(distributed.local(entry[TRAINING]))
            else:
                _exchange(weight, distributed.local(entry[AVERAGE]))
        self.state.average_used = 0

    def keep(self, params: Sequence[nn.Parameter], state: State) -> None:
        """Make the weights that the parameters hold the training weights."""
        self.loaded = False
        if not self.in_use:
            return
        for weight, entry in _averaged(params, state):
            if TRAINING not in entry:
                distributed.local(entry[AVERAGE]).copy_(weight)
        self.state.average_used = 0

    def forget(self, state: State) -> None:
        """Start the average again from the weights that the parameters hold; their shapes may have changed."""
        self.state.averaged_steps = self.state.average_used = 0
        self.loaded = False
        _drop(state)


def drop_averages(state: State, numbers: Mapping[str, Any]) -> None:
    """Remove the averages of a checkpoint, for an optimizer that keeps none.

    Args:
        state: the checkpoint's state.
        numbers: the checkpoint's numbers.

    Raises:
        ValueError: if the checkpoint was saved while the parameters held the average.
    """
    if numbers.get("average_used"):
        raise ValueError(
            "checkpoint: it was saved while the parameters held the average of the weights; build the optimizer "
            "with average=True to load it"
        )
    _drop(state)


def newest_weight(count: int) -> float:
    """Return the weight of the newest weights in an average of ``count`` weights."""
    return min(1.0, REACH / count)


def _averaged(params: Sequence[nn.Parameter], state: State) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield this process's shard of each parameter that has an average, and the parameter's state."""
    for p in params:
        entry = state.get(p, {})
        if AVERAGE in entry:
            yield distributed.local(p.detach()), entry


def _drop(state: State) -> None:
    for entry in state.values():
        entry.pop(AVERAGE, None)
        entry.pop(TRAINING, None)


def _exchange(one: Tensor, other: Tensor) -> None:
    value = one.clone()
    one.copy_(other)
    other.copy_(value)
