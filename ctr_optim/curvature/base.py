"""What a curvature is: a metric in which a step's length is measured, learned from ordinary training steps.

Notation of the whole package. One adapted linear map is ``y = W0 x + s B A x`` with A ``(r, d_in)``, B ``(d_out, r)``;
g is the per-token gradient at B's output (it contains s), ``h = A x``.

========  ================  ==========================================================================
symbol    shape             meaning
========  ================  ==========================================================================
C         (d_in, d_in)      E[x x^T] over the task's tokens
S         (d_out, d_out)    E[g g^T]
H         (r, r)            E[h h^T] = A C A^T
D         (r, r)            E[(B^T g)(B^T g)^T] = B^T S B
q         scalar            quadratic form of a step: ``<dA, D dA C> + <dB, S dB H>`` and a cross term
kappa     scalar            coupling: measured KL of a step over its block-diagonal prediction ``q / 2``
L                           layers of one shape, worked on together; always the first dimension
========  ================  ==========================================================================

Expectations are over tokens with a loss, and gradients are those of the per-token loss: batch size, accumulation,
padding and loss scaling change nothing.
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
    """Parameters of one shape, with their gradients and optimizer state in one tensor each.

    Attributes:
        params: L parameters.
        group: their parameter group.
        rank_dim: dimension of the LoRA rank: -2 for A, -1 for B; None for parameters of no LoRA layer.
        tensors: optimizer state by name, ``(L, ...)`` each.
    """

    params: list[nn.Parameter]
    group: dict[str, Any]
    rank_dim: int | None
    tensors: dict[str, Tensor]

    def values(self) -> Tensor:
        """``(L, *shape)`` the parameters in the state's dtype."""

    def live(self, finite: Tensor) -> Tensor:
        """``(L,)`` 1 for the parameters that this step moves."""

    def newest(self) -> Tensor | None:
        """This step's gradients ``(L, *shape)`` in the coordinates of the moments; None where there are none."""

    def coordinates(self, delta: Tensor) -> Tensor:
        """A step ``(L, *shape)`` in the coordinates of the moments."""

    def hold(self, key: str, stacked: Tensor, state: State) -> None:
        """Add a tensor ``(L, ...)`` to the state."""

    def set_basis(self, basis: Tensor) -> None:
        """Move to a new basis ``(L, r, r)``, moments and all."""

    def to_(self, device: torch.device, state: State) -> None:
        """Move the state to a device."""


class StackedPair(Protocol):
    """LoRA pairs of one shape: their stacks, and their places among the optimizer's pairs."""

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
    """LoRA pairs of one shape with their Kronecker factors: a curvature's account of these layers.

    Attributes:
        structure: structure of C and S.
        H, D: ``(L, r, r)``, exact.
        C, S: structured, batch dimension L.
        sketch: range ``(L, d_out, k)`` and corange ``(L, l, d_in)`` of the whitened gradient; empty unless one is open.
    """

    structure: type[Factor]
    H: Tensor
    D: Tensor
    C: Factor
    S: Factor
    sketch: list[Tensor]

    def whiteners(self, damping: float) -> tuple[Any, Any]:
        """Whiteners of C and S."""

    def weights(self) -> tuple[Tensor, Tensor]:
        """A ``(L, r, d_in)`` and B ``(L, d_out, r)`` in the factors' dtype."""

    def test_matrices(self) -> tuple[Tensor, Tensor]:
        """Omega ``(d_in, k)`` and Psi ``(d_out, l)`` of the sketch."""

    def drop_sketch(self, state: State) -> None:
        """Remove the sketch from the optimizer's state; the stacks must be built anew afterwards."""


class Gradients(Protocol):
    """Gradients of the last batch's loss at other parameters."""

    enabled: bool

    @property
    def ready(self) -> bool:
        """Whether there is a batch to run again."""

    def gradients(self, params: list[Tensor]) -> list[Tensor]:
        """Gradients for ``params`` with the parameters as they are now."""

    def sampled(self, work: Callable[[], list[Tensor]]) -> list[Tensor] | None:
        """What ``work``, which calls :meth:`gradients`, returns; None where it fails, in any process."""


class Curvature(Protocol):
    """A metric over all parameters that train.

    The optimizer calls, in the order of a training step: :meth:`arm`, then the user's forward and backward passes, then
    :meth:`update`, :meth:`refresh` and :meth:`quadratic`. ``prepare`` and ``bind`` follow each change of the stacks.
    :class:`~ctr_optim.curvature.defaults.CurvatureBase` has a default for every method.

    Attributes:
        state: dataclass of the numbers that a checkpoint carries; None for none.
    """

    state: Any

    def prepare(self, state: State, params: Sequence[nn.Parameter]) -> None:
        """Add the tensors of this curvature to the state of ``params``, where they are missing.

        Loading a checkpoint calls it, too, for one parameter at a time: a stand-in without storage.
        """

    def bind(self, pairs: Sequence[StackedPair], others: Sequence[Stacked]) -> None:
        """Take new stacks, which hold the state."""

    def unbind(self) -> None:
        """Drop the stacks: something replaced the state that they share."""

    def due(self, step: int) -> bool:
        """Whether the forward pass of this step is to be observed, for which stacks must be bound."""

    def arm(self, step: int) -> None:
        """Get ready for the forward pass of this step."""

    def update(self, finite: Tensor, agreed: Any) -> None:
        """Fold the statistics of this step's forward and backward passes into the averages.

        Args:
            finite: ``()`` whether the step is to be taken.
            agreed: options that all processes must share.
        """

    def refresh(self) -> int:
        """Renew the bases in which directions are found; returns how many decompositions failed."""

    def quadratic(self, deltas: Mapping[Any, Tensor], done: Iterable[Any]) -> list[Tensor]:
        """Terms ``()`` of the quadratic form of a step.

        Args:
            deltas: the step, ``(L, *shape)`` for each stack.
            done: blocks whose terms are known already.
        """

    @property
    def per_token(self) -> bool:
        """Whether the metric has the scale of a token's KL, so that an assumed coupling is better than none."""

    def tokens(self) -> Tensor | None:
        """``()`` loss tokens of a step, when statistics were last taken; None or infinite where they are not known."""

    def kl_form(self) -> Tensor | None:
        """``()`` block-diagonal estimate of the KL from the base model; None where no factors are known."""

    def switches(self) -> list[Tensor]:
        """Tensors that give the base model when all of them are zero."""

    def forget(self, unless: Tensor | None = None) -> None:
        """Drop the statistics of passes whose gradients are gone; ``unless``: ``()`` condition on the device."""

    def quiet(self) -> AbstractContextManager[None]:
        """A context in which forward passes leave no statistics."""

    def follow_devices(self, state: State) -> None:
        """Move everything to where the model has been moved."""

    def closer(self) -> Callable[[], None]:
        """A function that removes the hooks, and that keeps neither stacks nor state alive."""

    def settle(self) -> None:
        """Bring :attr:`state` up to date; may wait for the device."""

    def resume(self) -> None:
        """Continue with the numbers that were loaded into :attr:`state`."""

    def close(self) -> None:
        """Remove every hook from the model."""
