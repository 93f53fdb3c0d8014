"""Shrink the bound and restore the best weights after the held-out loss rises."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.holdout.rows import Holdout
from ctr_optim.runtime import distributed

BEST = "best"  # key in a parameter's state: its value with the lowest held-out loss

State = MutableMapping[Any, dict[str, Tensor]]


@dataclass(slots=True)
class HoldoutState:
    """Checkpoint numbers of a hold-out.

    Attributes:
        holdout_loss: last measured loss; None before the first measurement, or if it was not finite.
        holdout_best: loss of the best weights; None before the first measurement.
        holdout_best_step: number of steps taken before the best weights.
        holdout_factor: current factor of ``max_kl``.
    """

    holdout_loss: float | None = None
    holdout_best: float | None = None
    holdout_best_step: int = 0
    holdout_factor: float = 1.0


class Judge:
    """Measures the held-out loss; if it is not below the lowest so far, shrinks the bound and restores the weights.

    Args:
        holdout: the held-out rows.
        model: returns the model.
        quiet: returns a context in which forward passes record no statistics.
    """

    def __init__(
        self, holdout: Holdout, model: Callable[[], nn.Module], quiet: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.holdout, self._model, self._quiet = holdout, model, quiet
        self.state = HoldoutState()

    def metrics(self) -> dict[str, float | int | None]:
        """Return the last loss, the best loss, and the step of the best loss."""
        s = self.state
        return {
            "holdout/loss": s.holdout_loss,
            "holdout/best": s.holdout_best,
            "holdout/best_step": s.holdout_best_step,
        }

    def look(self, step: int, params: Sequence[nn.Parameter], state: State) -> bool:
        """Measure the held-out loss and act on it; return whether the best weights were restored.

        Args:
            step: number of steps taken.
            params: the optimizer's parameters.
            state: the optimizer's state, which stores the best weights.
        """
        if self._improved(step, params, state):
            return False
        self.state.holdout_factor *= self.holdout.shrink
        if self.holdout.rollback:
            self._restore(params, state)
        return self.holdout.rollback

    def restore_best(self, step: int, params: Sequence[nn.Parameter], state: State) -> float:
        """Restore the best weights, unless the current ones have a lower held-out loss; return the lowest loss."""
        if not self._improved(step, params, state):
            self._restore(params, state)
        assert self.state.holdout_best is not None
        return self.state.holdout_best

    def forget(self, state: State) -> None:
        """Drop the best weights: a rank event changed the shapes of the parameters."""
        for entry in state.values():
            entry.pop(BEST, None)

    def _improved(self, step: int, params: Sequence[nn.Parameter], state: State) -> bool:
        """Measure the loss; store the current weights if it is the lowest, or if no best weights are stored."""
        s, loss = self.state, self._loss()
        kept = all(BEST in state[p] for p in _trained(params))
        if kept and s.holdout_best is not None and not loss < s.holdout_best:
            return False
        s.holdout_best, s.holdout_best_step = loss, step
        self._keep(params, state)
        return True

    def _loss(self) -> float:
        with self._quiet():
            sums = self.holdout.sums(self._model())
        distributed.add_up([sums])
        loss = float(sums[0] / sums[1])
        self.state.holdout_loss = loss if math.isfinite(loss) else None
        return loss if math.isfinite(loss) else math.inf

    @torch.no_grad()
    def _keep(self, params: Sequence[nn.Parameter], state: State) -> None:
        for p in _trained(params):
            if BEST in state[p]:
                distributed.local(state[p][BEST]).copy_(distributed.local(p.detach()))
            elif state[p]:
                state[p][BEST] = p.detach().clone()

    @torch.no_grad()
    def _restore(self, params: Sequence[nn.Parameter], state: State) -> None:
        for p in _trained(params):
            distributed.local(p.detach()).copy_(distributed.local(state[p][BEST]))


def _trained(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in params if p.requires_grad]
