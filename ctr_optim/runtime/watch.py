"""Detection of two user errors: no gradients, and a learning rate so small that the trust region never acts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ctr_optim.runtime.messages import warn_no_gradient, warn_small_rate
from ctr_optim.settings import LEARNING_RATE

_CALLS_WITHOUT_GRADIENT = 3  # calls before the warning; the first one or two may be part of the loop's set-up
_INTERVAL = 20  # steps between checks; each check synchronises with the device
_LAST = 200  # last step with a check; later, small gradients of a nearly solved task can cause small steps
_SMALL_SHARE = 0.01  # of the bound; since KL is quadratic, such a step has at most 1/10 of the allowed length
_FULL_RATE = 0.9  # of the peak rate; below it, the learning rate schedule, not the user, makes the rate small


class Watch:
    """Issues at most one warning for each of the two errors. Checkpoints do not need its state."""

    def __init__(self) -> None:
        self._calls_without_gradient = 0
        self._rate_is_fine = False

    def no_gradient(self, steps: int) -> None:
        """Count a call of ``step()`` in which no parameter had a gradient, and warn at the third one.

        Args:
            steps: steps taken before this call; the warning needs 0.
        """
        self._calls_without_gradient += steps == 0
        if self._calls_without_gradient == _CALLS_WITHOUT_GRADIENT and steps == 0:
            warn_no_gradient(_CALLS_WITHOUT_GRADIENT)

    def stepped(
        self,
        steps: int,
        groups: Sequence[dict[str, Any]],
        predicted: Tensor | float,
        scale: Tensor | float,
        bound: Tensor | float | None,
    ) -> None:
        """Check steps 1, 20, 40, ..., 200, until the trust region shortens a step or a warning is issued.

        Args:
            steps: steps taken, including this one.
            groups: the parameter groups, with ``lr`` and ``peak_lr``.
            predicted: ``()`` predicted KL of the step, in nats per token.
            scale: ``()`` the factor that the trust region applied to the step.
            bound: KL bound of this step, in nats per token; None without a trust region.
        """
        if self._rate_is_fine or bound is None or steps > _LAST or (steps != 1 and steps % _INTERVAL) or not bound:
            return
        acted = float(scale)
        if acted != 1.0:  # 0 means a skipped step, which gives no information about the rate
            self._rate_is_fine = acted > 0
            return
        lr, peak = (max(float(group.get(key, 0.0)) for group in groups) for key in ("lr", "peak_lr"))
        share = float(predicted) / float(bound)
        small = lr < LEARNING_RATE and 0 < share < _SMALL_SHARE
        if small and steps >= _INTERVAL and lr >= _FULL_RATE * peak > 0:
            self._rate_is_fine = True  # stops further checks: one warning is enough
            warn_small_rate(lr, share)
