"""Protocols of the trust region: a step, the trained part of the model, and re-runs of the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

# Parameters, and the value to add to each; None sets them to zero.
Changes = Sequence[tuple[Sequence[Tensor], Sequence[Tensor] | None]]


class Step(Protocol):
    """A step before it is applied."""

    @property
    def q(self) -> Tensor:
        """``()`` quadratic form of the step in the curvature's metric."""

    @property
    def slope(self) -> Tensor:
        """``()`` derivative of the loss along the step."""

    @property
    def tokens(self) -> Tensor | None:
        """``()`` number of loss tokens of the step; None if unknown."""

    def changes(self) -> Changes:
        """Return the parameters that the step changes, and the change of each."""


class Adapter(Protocol):
    """The trained part of the model."""

    @property
    def per_token(self) -> bool:
        """Whether the metric has the scale of a KL per token, so that a bound with an assumed coupling makes sense."""

    def kl_form(self) -> Tensor | None:
        """Return ``()`` the block-diagonal estimate of the KL from the base model, nats per token; None if unknown."""

    def switches(self) -> list[Tensor]:
        """Return the tensors that are zero in the base model: every layer's B."""


class Prober(Protocol):
    """Re-runs the model on a slice of the last batch.

    Attributes:
        enabled: whether to store the coming forward pass.
        refused: reason of the last failure; None before any failure.
    """

    enabled: bool
    refused: str | None

    @property
    def ready(self) -> bool:
        """Whether a usable batch is stored."""

    def logits(self) -> Tensor | None:
        """Return ``(n, V)`` logits with the current parameters; None on failure."""

    def logits_with_graph(self) -> Tensor:
        """Return ``(n, V)`` logits with the current parameters, to differentiate; raise RuntimeError on failure."""

    def logits_in_training(self) -> Tensor | None:
        """Return ``(n, V)`` logits of the training's own forward pass; None on failure."""

    def moved(self, changes: Changes, factor: float | Tensor = 1.0) -> AbstractContextManager[None] | None:
        """Displace the parameters by ``factor`` times ``changes``; return a context that restores them, or None."""

    def divergence(self, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return ``()`` the KL summed over loss tokens, in nats, and ``()`` their number; None on failure."""

    def divergence_outside(self, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the same over the compared tokens outside the loss; None if there are none, or on failure."""

    def loss_tokens(self, logits: Tensor) -> Tensor:
        """Return ``(n,)`` whether the loss uses each token."""

    def release(self) -> None:
        """Drop the stored batch."""

    def close(self) -> None:
        """Remove the hooks and drop the batch."""


class Quiet(Protocol):
    """Returns a context in which forward passes record no statistics."""

    def __call__(self) -> AbstractContextManager[None]: ...
