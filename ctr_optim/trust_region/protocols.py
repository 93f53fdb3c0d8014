"""The least that the trust region must know of a step, of the trained part of the model, and of the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

# parameters, and what is added to each; None: they become zero
Changes = Sequence[tuple[Sequence[Tensor], Sequence[Tensor] | None]]


class Step(Protocol):
    """A step that is about to be taken."""

    @property
    def q(self) -> Tensor:
        """``()`` quadratic form of the step in the curvature's metric."""

    @property
    def slope(self) -> Tensor:
        """``()`` derivative of the loss along the step."""

    @property
    def tokens(self) -> Tensor | None:
        """``()`` loss tokens of the step; None where they are not known."""

    def changes(self) -> Changes:
        """The parameters that the step moves, and its delta for each."""


class Adapter(Protocol):
    """The trained part of the model, which is zero in the base model."""

    @property
    def per_token(self) -> bool:
        """Whether the metric has the scale of a token's KL, so that an assumed coupling is better than none."""

    def kl_form(self) -> Tensor | None:
        """``()`` block-diagonal estimate of the KL from the base model; None where no factors are known."""

    def switches(self) -> list[Tensor]:
        """Tensors that give the base model when all of them are zero: every layer's B."""


class Prober(Protocol):
    """Runs the model again on a slice of the last batch."""

    enabled: bool
    refused: str | None

    @property
    def ready(self) -> bool:
        """Whether there is a batch to run again."""

    def logits(self) -> Tensor | None:
        """``(n, V)`` logits with the parameters as they are now; None where there are none."""

    def logits_in_training(self) -> Tensor | None:
        """``(n, V)`` logits of the training's own forward pass."""

    def moved(self, changes: Changes, factor: float | Tensor = 1.0) -> AbstractContextManager[None] | None:
        """The parameters displaced until the block ends, by None: to zero. None where memory does not suffice."""

    def divergence(self, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor] | None:
        """KL summed over loss tokens, and their number; None where memory does not suffice."""

    def loss_tokens(self, logits: Tensor) -> Tensor:
        """``(n,)`` whether the loss looks at each token."""

    def release(self) -> None:
        """Forget the batch."""

    def close(self) -> None:
        """Remove the hooks and forget the batch."""


class Quiet(Protocol):
    """Makes a context in which forward passes leave no statistics."""

    def __call__(self) -> AbstractContextManager[None]: ...
