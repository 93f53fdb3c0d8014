"""Base class with a default for every method of a curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from ctr_optim.curvature.base import Curvature, Gradients, LossScale, Stacked, StackedPair, State
from ctr_optim.model.pair import LoRAPair
from ctr_optim.settings import Settings


class CurvatureBase:
    """A curvature that does nothing. Subclasses override the methods that they need.

    It implements the protocol :class:`~ctr_optim.curvature.base.Curvature`.

    Attributes:
        measures: whether the metric gives a step a length. If not, there is no trust region.
        reruns: whether the curvature runs its own forward and backward passes. These need a prober and unsharded
            parameters: only the training's own passes gather sharded ones.
        per_token: whether the metric has the scale of the KL per token.
        state: dataclass of the numbers that a checkpoint carries; None if there are none.
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
            prober: returns gradients of the last batch's loss; None if no single model holds all parameters, or if
                neither this class nor the coupling re-runs the model.
        """
        return cls()

    def prepare(self, state: State, params: Sequence[nn.Parameter]) -> None:
        """Add nothing to the state."""

    def bind(self, pairs: Sequence[StackedPair], others: Sequence[Stacked]) -> None:
        """Ignore the stacks."""

    def unbind(self) -> None:
        """Do nothing: this class holds no stacks."""

    def due(self, step: int) -> bool:
        """Return False: no forward pass is observed."""
        return False

    def arm(self, step: int) -> None:
        """Do nothing before the forward pass."""

    def update(self, finite: Tensor, agreed: Any, loss_scale: LossScale | None = None) -> None:
        """Keep no statistics."""

    def refresh(self) -> int:
        """Keep the bases, and return 0 failures."""
        return 0

    def quadratic(self, deltas: Mapping[Any, Tensor], done: Iterable[Any]) -> list[Tensor]:
        """Return no terms: a step has no length."""
        return []

    def tokens(self) -> Tensor | None:
        """Return None: the number of loss tokens is unknown."""
        return None

    def kl_form(self) -> Tensor | None:
        """Return None: there are no factors."""
        return None

    def switches(self) -> list[Tensor]:
        """Return no tensors: the base model is unknown."""
        return []

    def forget(self, unless: Tensor | None = None) -> None:
        """Do nothing: there are no statistics."""

    def quiet(self) -> AbstractContextManager[None]:
        """Return an empty context: forward passes add no statistics."""
        return nullcontext()

    def follow_devices(self, state: State) -> None:
        """Do nothing: this class holds no tensors outside the stacks."""

    def closer(self) -> Callable[[], None]:
        """Return a function that does nothing: there are no hooks."""
        return _nothing

    def settle(self) -> None:
        """Do nothing: :attr:`state` is always up to date."""

    def resume(self) -> None:
        """Do nothing after :attr:`state` was loaded."""

    def close(self) -> None:
        """Remove every hook."""
        self.closer()()


def _nothing() -> None:
    """Do nothing."""
