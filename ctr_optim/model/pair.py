"""LoRAPair, one LoRA layer: the type by which all packages refer to layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ctr_optim.linalg.shapes import sized
from ctr_optim.runtime.distributed import whole, write_


class Library(Protocol):
    """Interface to the layers of one LoRA library: reads the scaling, and updates attributes after a rank change."""

    def scaling(self, pair: LoRAPair) -> float:
        """Return the factor ``s`` in ``y = W0 x + s B A x``."""

    def rank_changed(self, pair: LoRAPair, old_scaling: float) -> None:
        """Set the layer's attributes to the new shapes of A and B, and keep ``s`` at ``old_scaling``."""


@dataclass(frozen=True, eq=False)
class LoRAPair:
    """One adapted linear map ``y = W0 x + s B A x``.

    Attributes:
        name: dotted name of the adapted layer in the base model.
        down: the module whose ``weight`` is A, shape ``(rank, d_in)``.
        up: the module whose ``weight`` is B, shape ``(d_out, rank)``.
        layer: the module that owns ``down`` and ``up`` (a PEFT ``LoraLayer``, a torchtune ``LoRALinear``, ...).
        adapter: name of the adapter in libraries that allow several adapters, else ``None``.
        library: reads and updates the attributes of ``layer``.
    """

    name: str
    down: nn.Module
    up: nn.Module
    layer: nn.Module
    adapter: str | None
    library: Library

    @property
    def A(self) -> nn.Parameter:
        """The down-projection, ``(rank, d_in)``."""
        return self.down.weight  # type: ignore[return-value]

    @property
    def B(self) -> nn.Parameter:
        """The up-projection, ``(d_out, rank)``."""
        return self.up.weight  # type: ignore[return-value]

    @property
    def rank(self) -> int:
        """The allocated rank, the number of rows of A; :func:`ranks_in_use` counts the directions in use."""
        return self.A.shape[0]

    @property
    def max_rank(self) -> int:
        """The largest useful rank, ``min(d_in, d_out)``."""
        return min(self.A.shape[1], self.B.shape[0])

    @property
    def cost(self) -> int:
        """Number of parameters of one direction, ``d_in + d_out``."""
        return self.A.shape[1] + self.B.shape[0]

    @property
    def scaling(self) -> float:
        """The factor ``s``; a rank change does not alter it."""
        return self.library.scaling(self)

    def weights(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the first ``rank`` directions, detached: A ``(rank, d_in)`` and B ``(d_out, rank)``.

        Under FSDP2 this gathers the weights, so all processes must call it.
        """
        return whole(self.A.detach())[:rank], whole(self.B.detach())[:, :rank]

    @torch.no_grad()
    def fill(self, a: Tensor, b: Tensor) -> None:
        """Overwrite the weights in place with k directions, and set all other directions to zero.

        The shapes stay. A direction whose row of A and column of B are both zero has a zero gradient, so it stays zero.

        Args:
            a: new A, ``(k, d_in)``.
            b: new B, ``(d_out, k)``.

        Raises:
            ValueError: if the shapes do not belong to this layer, or k exceeds the allocated rank.
        """
        rank, (room, d_in), d_out = a.shape[0], self.A.shape, self.B.shape[0]
        if a.shape != (rank, d_in) or b.shape != (d_out, rank) or rank > room:
            raise ValueError(
                f"{self.name}: cannot take A {tuple(a.shape)} and B {tuple(b.shape)}; expected (r, {d_in}) and "
                f"({d_out}, r) with r <= {room}, the rank that was allocated"
            )
        for parameter, new in ((self.A, sized(a, (0,), room)), (self.B, sized(b, (1,), room))):
            parameter.grad = None
            write_(parameter, new)

    @torch.no_grad()
    def resize(self, a: Tensor, b: Tensor) -> None:
        """Replace the weights in place by weights of another rank.

        The Parameters stay the same objects, so parameter groups, hooks and other references stay valid. ``set_``,
        unlike ``.data``, also replaces the gradient accumulator, which has the old shape.

        Args:
            a: new A, ``(new_rank, d_in)``.
            b: new B, ``(d_out, new_rank)``.

        Raises:
            ValueError: if the shapes do not belong to this layer.
        """
        rank, d_in, d_out = a.shape[0], self.A.shape[1], self.B.shape[0]
        if a.shape != (rank, d_in) or b.shape != (d_out, rank) or not 1 <= rank <= self.max_rank:
            raise ValueError(
                f"{self.name}: cannot take A {tuple(a.shape)} and B {tuple(b.shape)}; expected "
                f"(r, {d_in}) and ({d_out}, r) with 1 <= r <= {self.max_rank}"
            )
        scaling = self.scaling
        for parameter, new in ((self.A, a), (self.B, b)):
            parameter.grad = None
            weight = new.detach().to(parameter, copy=True, memory_format=torch.contiguous_format)
            parameter.set_(weight)  # type: ignore[call-overload]
        self.library.rank_changed(self, scaling)


@torch.no_grad()
def ranks_in_use(pairs: Sequence[LoRAPair]) -> list[int]:
    """Return the rank in use of each layer: the position of its last direction that is not zero in both A and B.

    The weights themselves show which directions are in use, so checkpoints need no extra entry. Synchronises with the
    device once.
    """
    counts = []
    for pair in pairs:
        a, b = pair.weights(pair.rank)
        used = (a != 0).any(1) | (b != 0).any(0)
        counts.append((used * torch.arange(1, pair.rank + 1, device=used.device)).amax())
    return torch.stack([c.to(counts[0].device) for c in counts]).tolist() if counts else []
