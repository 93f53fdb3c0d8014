"""The default of every method of a curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from ctr_optim.curvature.base import Curvature, Gradients, Stacked, StackedPair, State
from ctr_optim.model.pair import LoRAPair
from ctr_optim.settings import Settings


class CurvatureBase:
    """Implements :class:`~ctr_optim.curvature.base.Curvature` by doing nothing; subclasses override what they need.

    Attributes:
        measures: whether a step has a length in this metric; without one no trust region holds.
        reruns: whether the curvature runs forward and backward passes of its own. It then gets a prober, and refuses
            sharded parameters, which only the training's own passes gather.
        per_token: whether the metric has the scale of a token's KL.
        state: dataclass of the numbers that a checkpoint carries; None for none.
    """

    measures: ClassVar[bool] = True
    reruns: ClassVar[bool] = False
    per_token: bool = False
    state: Any = None

    @classmethod
    def build(cls, pairs: Sequence[LoRAPair], settings: Settings, prober: Gradients | None) -> Curvature:
        """Return the curvature of an optimizer.

        Args:
            pairs: LoRA layers whose B is trained.
            settings: options of the optimizer.
            prober: gives gradients of the last batch's loss; None unless :attr:`reruns` and one model holds all
                parameters.
        """
        return cls()

    def prepare(self, state: State, params: Sequence[nn.Parameter]) -> None:
        """Add nothing to the state."""

    def bind(self, pairs: Sequence[StackedPair], others: Sequence[Stacked]) -> None:
        """Need no stacks."""

    def unbind(self) -> None:
        """Hold no stacks."""

    def due(self, step: int) -> bool:
        """Observe no forward pass."""
        return False

    def arm(self, step: int) -> None:
        """Change nothing before the forward pass."""

    def update(self, finite: Tensor, agreed: Any) -> None:
        """Learn nothing."""

    def refresh(self) -> int:
        """Keep the bases as they are."""
        return 0

    def quadratic(self, deltas: Mapping[Any, Tensor], done: Iterable[Any]) -> list[Tensor]:
        """Return no terms: the step has no length."""
        return []

    def tokens(self) -> Tensor | None:
        """Return None: the loss tokens are not known."""
        return None

    def kl_form(self) -> Tensor | None:
        """Return None: no factors are known."""
        return None

    def switches(self) -> list[Tensor]:
        """Return no tensors: the base model is not known."""
        return []

    def forget(self, unless: Tensor | None = None) -> None:
        """Drop nothing."""

    def quiet(self) -> AbstractContextManager[None]:
        """Return an empty context: forward passes leave no statistics."""
        return nullcontext()

    def follow_devices(self, state: State) -> None:
        """Hold no tensor outside of the stacks."""

    def closer(self) -> Callable[[], None]:
        """Return a function that removes no hook."""
        return _nothing

    def settle(self) -> None:
        """Hold no number on the device."""

    def resume(self) -> None:
        """Need nothing after :attr:`state` was loaded."""

    def close(self) -> None:
        """Remove every hook."""
        self.closer()()


def _nothing() -> None:
    """Do nothing."""
