"""What follows from the loss on held-out rows: a smaller bound, and the way back to the best weights."""

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

BEST = "best"  # in the state of a parameter: its value where the held-out loss was lowest

State = MutableMapping[Any, dict[str, Tensor]]


@dataclass(slots=True)
class HoldoutState:
    """Numbers of a hold-out that a checkpoint carries.

    Attributes:
        holdout_loss: last measured; None before the first look.
        holdout_best: lowest measured; holdout_best_step: steps taken by then.
        holdout_factor: what the bound is multiplied by.
    """

    holdout_loss: float | None = None
    holdout_best: float | None = None
    holdout_best_step: int = 0
    holdout_factor: float = 1.0


class Judge:
    """Looks at the held-out rows now and then.

    Where their loss has risen above the lowest so far, the bound shrinks, and the weights go back.

    Args:
        holdout: the rows.
        model: runs them.
        quiet: makes a context in which forward passes leave no statistics.
    """

    def __init__(
        self, holdout: Holdout, model: Callable[[], nn.Module], quiet: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.holdout, self._model, self._quiet = holdout, model, quiet
        self.state = HoldoutState()

    def metrics(self) -> dict[str, float | int | None]:
        """What was measured last, and what followed."""
        s = self.state
        return {
            "holdout/loss": s.holdout_loss,
            "holdout/best": s.holdout_best,
            "holdout/best_step": s.holdout_best_step,
        }

    def look(self, step: int, params: Sequence[nn.Parameter], state: State) -> bool:
        """Measure the loss after ``step`` steps, and draw the consequences; returns whether the weights went back.

        Args:
            step: steps taken.
            params: the parameters that train.
            state: the optimizer's state, which keeps their best values.
        """
        if self._improved(step, params, state):
            return False
        self.state.holdout_factor *= self.holdout.shrink
        if self.holdout.rollback:
            self._restore(params, state)
        return self.holdout.rollback

    def restore_best(self, step: int, params: Sequence[nn.Parameter], state: State) -> float:
        """Go back to the weights of the lowest held-out loss, unless today's are better; returns that loss."""
        if not self._improved(step, params, state):
            self._restore(params, state)
        assert self.state.holdout_best is not None
        return self.state.holdout_best

    def forget(self, state: State) -> None:
        """Ranks have moved: the best weights so far fit no more."""
        for entry in state.values():
            entry.pop(BEST, None)

    def _improved(self, step: int, params: Sequence[nn.Parameter], state: State) -> bool:
        """Measure the loss; where it is the lowest, or no weights are kept to go back to, keep today's weights."""
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
