"""No curvature: nothing is observed, no step has a length, and no trust region can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from ctr_optim.curvature.base import Stacked, StackedPair, State


class NoCurvature:
    """Implements :class:`~ctr_optim.curvature.base.Curvature` by doing nothing; others override the parts they need."""

    per_token: bool = False

    def prepare(self, state: State, params: Sequence[nn.Parameter]) -> None:
        """Keep nothing in the state."""

    def bind(self, pairs: Sequence[StackedPair], others: Sequence[Stacked]) -> None:
        """Need no stacks."""

    def due(self, step: int) -> bool:
        """Observe no forward pass."""
        return False

    def arm(self, step: int) -> None:
        """Get ready for nothing."""

    def update(self, finite: Tensor, agreed: Any) -> None:
        """Learn nothing."""

    def refresh(self) -> int:
        """Keep the bases as they are."""
        return 0

    def quadratic(self, deltas: Mapping[Any, Tensor], done: Iterable[Any]) -> list[Tensor]:
        """No terms: the step has no length."""
        return []

    def tokens(self) -> Tensor | None:
        """Unknown."""
        return None

    def kl_form(self) -> Tensor | None:
        """Unknown."""
        return None

    def switches(self) -> list[Tensor]:
        """None are known."""
        return []

    def forget(self, unless: Tensor | None = None) -> None:
        """There is nothing to drop."""

    def quiet(self) -> AbstractContextManager[None]:
        """Forward passes leave no statistics anyway."""
        return nullcontext()

    def follow_devices(self, state: State) -> None:
        """Nothing is kept on any device."""

    def closer(self) -> Callable[[], None]:
        """There are no hooks."""
        return nothing

    def close(self) -> None:
        """Remove every hook."""
        self.closer()()


def nothing() -> None:
    """Do nothing."""
