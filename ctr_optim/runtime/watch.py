"""Notice training that goes nowhere: no gradients, or a learning rate so small that the trust region never acts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ctr_optim.runtime.messages import warn_no_gradient, warn_small_rate

_CALLS_WITHOUT_GRADIENT = 3  # before the user is warned; one or two may belong to the start of a loop
_INTERVAL = 20  # steps between looks, each of which waits for the device
_LAST = 200  # later, the small gradients of a nearly solved task may be the cause of small steps
_SMALL_SHARE = 0.01  # of the bound; the step then has at most a tenth of the length that the bound allows
_FULL_RATE = 0.9  # of the peak; below it the schedule, not the user, made the rate small


class Watch:
    """Warns once about each of the two faults. Holds no state that a checkpoint needs."""

    def __init__(self) -> None:
        self._calls_without_gradient = 0
        self._rate_is_fine = False

    def no_gradient(self, steps: int) -> None:
        """Count a call of ``step()`` that found no gradient, ``steps`` steps having been taken before."""
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
        """Look at steps 1, 20, 40, ..., 200, until the trust region has acted or the user was warned.

        Args:
            steps: steps taken, this one included.
            groups: the parameter groups, with ``lr`` and ``peak_lr``.
            predicted: ``()`` the step's predicted KL in nats per token.
            scale: ``()`` the factor that the trust region applied to the step.
            bound: of this step in nats per token; None for no trust region.
        """
        if self._rate_is_fine or bound is None or steps > _LAST or (steps != 1 and steps % _INTERVAL) or not bound:
            return
        acted = float(scale)
        if acted != 1.0:  # 0 is a skipped step, which says nothing about the rate
            self._rate_is_fine = acted > 0
            return
        lr, peak = (max(float(group.get(key, 0.0)) for group in groups) for key in ("lr", "peak_lr"))
        share = float(predicted) / float(bound)
        if steps >= _INTERVAL and lr >= _FULL_RATE * peak > 0 and 0 < share < _SMALL_SHARE:
            self._rate_is_fine = True  # said once
            warn_small_rate(lr, share)
