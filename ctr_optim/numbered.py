"""The numbers of the optimizer as a whole: their owners, and their way into checkpoints and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ctr_optim.checkpoint.numbers import pack, unpack
from ctr_optim.curvature.base import Curvature
from ctr_optim.direction.average import Average
from ctr_optim.holdout import Judge
from ctr_optim.ranks.controller import RankController, RankState
from ctr_optim.retention.budget import Budget
from ctr_optim.runtime.counters import Counters
from ctr_optim.runtime.messages import warn_skipped
from ctr_optim.trust_region.region import TrustRegion


class Numbered(Optimizer):
    """Optimizer whose parts own numbers that checkpoints contain."""

    _counters: Counters
    _rank_state: RankState
    _trust: TrustRegion
    _curvature: Curvature
    _ranks: RankController | None
    _budget: Budget | None
    _judge: Judge | None
    _average: Average | None = None
    _skipped: Tensor | None

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return self._counters.steps

    def _owners(self) -> list[Any]:
        """Return the state objects whose numbers a checkpoint stores."""
        owners = [self._counters, self._rank_state, *self._trust.states]
        owners += [] if self._budget is None else [self._budget.state]
        owners += [] if self._judge is None else [self._judge.state]
        owners += [] if self._average is None else [self._average.state]
        return owners if self._curvature.state is None else [*owners, self._curvature.state]

    def _go_on(self, numbers: Mapping[str, Any]) -> None:
        """Copy checkpoint numbers into the objects that own them."""
        if numbers:
            unpack(numbers, self._owners())
        if self._average is not None:
            self._average.loaded = self._average.in_use
        self._trust.resume()
        self._curvature.resume()

    def _numbers(self) -> dict[str, Any]:
        """Return the optimizer-wide numbers; checkpoints store them in the first group under ``"ctr"``."""
        if self._ranks is not None:
            self._ranks.settle()
        self._curvature.settle()
        self._trust.settle()
        return pack(self._owners())

    def _count_skipped(self) -> None:
        """Add the device's count of skipped steps to the state; waits for the device."""
        skipped, self._skipped = int(self._skipped or 0), None
        if skipped:
            self._counters.skipped += skipped
            warn_skipped()

    def _mirror(self) -> None:
        """Copy the numbers to the first group, because torch.distributed.checkpoint saves the live groups."""
        self.param_groups[0]["ctr"] = self._numbers()
