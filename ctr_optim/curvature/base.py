"""Protocols of a curvature: a metric that measures the length of a step and is learned during training.

This notation holds for the whole package. One adapted linear map is ``y = W0 x + s B A x`` with A ``(r, d_in)`` and
B ``(d_out, r)``. ``h = A x``, and g is the per-token gradient at B's output. g contains the factor s.

========  ================  ==========================================================================
symbol    shape             meaning
========  ================  ==========================================================================
C         (d_in, d_in)      E[x x^T] over the task's tokens
S         (d_out, d_out)    E[g g^T]
H         (r, r)            E[h h^T] = A C A^T
D         (r, r)            E[(B^T g)(B^T g)^T] = B^T S B
q         scalar            quadratic form of a step: ``<dA, D dA C> + <dB, S dB H>`` and a cross term
kappa     scalar            coupling: measured KL of a step divided by its block-diagonal prediction ``q / 2``
L         scalar            number of layers of one shape in a batched call; always the first dimension
========  ================  ==========================================================================

Expectations run over the tokens that have a loss, and gradients are those of the per-token loss. Therefore the factors
do not depend on batch size, gradient accumulation, padding or loss scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ctr_optim.curvature.factors.base import Factor
from ctr_optim.model.pair import LoRAPair

State = MutableMapping[Any, dict[str, Tensor]]


class Stacked(Protocol):
    """L parameters of one shape, with each entry of their optimizer state stacked in one tensor.

    Attributes:
        params: L parameters.
        group: the parameter group of all L parameters.
        rank_dim: dimension of the LoRA rank: -2 for A, -1 for B; None for a parameter outside LoRA layers.
        tensors: optimizer state by name, ``(L, ...)`` each.
    """

    params: list[nn.Parameter]
    group: dict[str, Any]
    rank_dim: int | None
    tensors: dict[str, Tensor]

    def values(self) -> Tensor:
        """Return the parameters ``(L, *shape)`` in the dtype of the state."""

    def live(self, finite: Tensor) -> Tensor:
        """Return ``(L,)``: 1 for each parameter that this step moves, else 0."""

    def newest(self) -> Tensor | None:
        """Return this step's gradients ``(L, *shape)`` in the coordinates of the moments; None without gradients."""

    def coordinates(self, delta: Tensor) -> Tensor:
        """Return a step ``(L, *shape)`` in the coordinates of the moments."""

    def hold(self, key: str, stacked: Tensor, state: State) -> None:
        """Add a tensor ``(L, ...)`` to the state under the name ``key``."""

    def set_basis(self, basis: Tensor) -> None:
        """Change to a new basis ``(L, r, r)`` and rotate the moments into it."""

    def to_(self, device: torch.device, state: State) -> None:
        """Move the state to a device."""


class StackedPair(Protocol):
    """LoRA pairs of one shape: their stacks, and their indices in the optimizer's list of pairs.

    ``borrowed`` holds, for each pair whose A belongs to another layer, the stack and the row that hold this A.
    """

    @property
    def pairs(self) -> Sequence[LoRAPair]: ...
    @property
    def indices(self) -> Sequence[int]: ...
    @property
    def a(self) -> Stacked | None: ...
    @property
    def b(self) -> Stacked: ...
    @property
    def borrowed(self) -> Sequence[tuple[Stacked, int]]: ...


class Factored(StackedPair, Protocol):
    """LoRA pairs of one shape with their Kronecker factors.

    Attributes:
        structure: structure of C and S.
        H, D: full matrices ``(L, r, r)``.
        C, S: structured matrices with batch dimension L.
        sketch: range ``(L, d_out, k)`` and corange ``(L, l, d_in)`` of the whitened gradient; empty while no sketch is
            open.
    """

    structure: type[Factor]
    H: Tensor
    D: Tensor
    C: Factor
    S: Factor
    sketch: list[Tensor]

    def whiteners(self, damping: float) -> tuple[Any, Any]:
        """Return the whiteners of C and S.

        Args:
            damping: relative to the mean eigenvalue.
        """

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return A ``(L, r, d_in)`` and B ``(L, d_out, r)`` in the factors' dtype."""

    def test_matrices(self) -> tuple[Tensor, Tensor]:
        """Return the test matrices Omega ``(d_in, k)`` and Psi ``(d_out, l)`` of the sketch."""

    def drop_sketch(self, state: State) -> None:
        """Remove the sketch from the optimizer's state. The caller must rebuild the stacks afterwards."""


class Gradients(Protocol):
    """Re-runs the last batch and returns the gradients of its loss.

    Attributes:
        enabled: whether the next training batch is kept for a re-run.
    """

    enabled: bool

    @property
    def ready(self) -> bool:
        """Whether a batch is available for a re-run."""

    def gradients(self, params: list[Tensor]) -> list[Tensor]:
        """Return the gradients of ``params`` at the current parameter values."""

    def sampled(self, work: Callable[[], list[Tensor]]) -> list[Tensor] | None:
        """Call ``work``, which uses :meth:`gradients`, and return its result; None if it fails in any process."""


class LossScale(Protocol):
    """The scale s of the loss, which averages of squared gradients should not depend on."""

    def add(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``()`` the factor of the former averages, and ``()`` the factor of this step's squared gradients.

        Args:
            weight: ``()`` weight of this step in the averages.
        """


class Curvature(Protocol):
    """A metric over all trained parameters.

    In each training step the optimizer calls :meth:`arm` before the user's forward and backward passes. After them it
    calls :meth:`update`, :meth:`refresh` and :meth:`quadratic`. It calls ``prepare`` and ``bind`` after each change of
    the stacks. :class:`~ctr_optim.curvature.defaults.CurvatureBase` has a default for every method.

    Attributes:
        state: dataclass of the numbers that a checkpoint carries; None if there are none.
    """

    state: Any

    def prepare(self, state: State, params: Sequence[nn.Parameter]) -> None:
        """Add this curvature's missing tensors to the state of ``params``.

        Loading a checkpoint also calls this method, with one meta-device placeholder at a time in place of a parameter.
        """

    def bind(self, pairs: Sequence[StackedPair], others: Sequence[Stacked]) -> None:
        """Use new stacks, which hold the state.

        Args:
            pairs: stacks of LoRA pairs.
            others: stacks of all other trained parameters.
        """

    def unbind(self) -> None:
        """Drop the stacks, because the state that they share was replaced."""

    def due(self, step: int) -> bool:
        """Whether this curvature observes the forward pass of ``step``. If so, the caller binds stacks first."""

    def arm(self, step: int) -> None:
        """Prepare for the forward pass of ``step``."""

    def update(self, finite: Tensor, agreed: Any, loss_scale: LossScale | None = None) -> None:
        """Add the statistics of this step's forward and backward passes to the moving averages.

        Args:
            finite: ``()`` whether all gradients are finite, so that the step is taken.
            agreed: options that must be equal in all processes.
            loss_scale: the scale of this step's loss; None if it is unknown.
        """

    def refresh(self) -> int:
        """Recompute the bases in which Adam runs, and return the number of failed decompositions."""

    def quadratic(self, deltas: Mapping[Any, Tensor], done: Iterable[Any]) -> list[Tensor]:
        """Return the terms ``()`` of the quadratic form of a step.

        Args:
            deltas: the step, ``(L, *shape)`` for each stack.
            done: blocks whose terms the caller has already computed.
        """

    @property
    def per_token(self) -> bool:
        """Whether the metric has the scale of the KL per token, so that an assumed coupling can bound a step."""

    def tokens(self) -> Tensor | None:
        """Return ``()`` the loss tokens of the last observed step; None or infinite if they are unknown."""

    def kl_form(self) -> Tensor | None:
        """Return ``()`` the block-diagonal estimate of the KL from the base model; None without factors."""

    def switches(self) -> list[Tensor]:
        """Return the tensors that turn the model into the base model when all of them are zero."""

    def forget(self, unless: Tensor | None = None) -> None:
        """Drop the statistics of passes whose gradients were cleared.

        Args:
            unless: ``()`` condition on the device; if it is true, the statistics stay.
        """

    def quiet(self) -> AbstractContextManager[None]:
        """Return a context in which forward passes add no statistics."""

    def follow_devices(self, state: State) -> None:
        """Move all tensors to the device that the model was moved to."""

    def closer(self) -> Callable[[], None]:
        """Return a function that removes the hooks. It must not keep stacks or state alive."""

    def settle(self) -> None:
        """Bring :attr:`state` up to date; this may wait for the device."""

    def resume(self) -> None:
        """Continue with the numbers that were loaded into :attr:`state`."""

    def close(self) -> None:
        """Remove every hook from the model."""
