"""LoRAPair, one LoRA-adapted linear map: the type that all parts exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ctr_optim.linalg.shapes import sized
from ctr_optim.runtime.distributed import whole, write_


class Library(Protocol):
    """Bookkeeping of one LoRA library: the scaling of a layer, and its attributes after the rank changed."""

    def scaling(self, pair: LoRAPair) -> float:
        """Return the factor ``s`` in ``y = W0 x + s B A x``."""

    def rank_changed(self, pair: LoRAPair, old_scaling: float) -> None:
        """Set the layer's attributes to the shapes of A and B; ``s`` stays ``old_scaling``."""


@dataclass(frozen=True, eq=False)
class LoRAPair:
    """One adapted linear map ``y = W0 x + s B A x``.

    Attributes:
        name: the adapted layer's dotted name in its base model.
        down: the module whose ``weight`` is A, shape ``(rank, d_in)``.
        up: the module whose ``weight`` is B, shape ``(d_out, rank)``.
        layer: the module that owns both (a PEFT ``LoraLayer``, a torchtune ``LoRALinear``, ...).
        adapter: the adapter's name in libraries that allow several, else ``None``.
        library: keeps ``layer``'s bookkeeping.
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
        """Rows of A: the allocated rank (:func:`ranks_in_use` counts the directions in use)."""
        return self.A.shape[0]

    @property
    def max_rank(self) -> int:
        """``min(d_in, d_out)``: more directions than this add nothing."""
        return min(self.A.shape[1], self.B.shape[0])

    @property
    def cost(self) -> int:
        """Parameters of one direction."""
        return self.A.shape[1] + self.B.shape[0]

    @property
    def scaling(self) -> float:
        """The factor ``s``; it stays what it was when the rank changes."""
        return self.library.scaling(self)

    def weights(self, rank: int) -> tuple[Tensor, Tensor]:
        """The first ``rank`` directions: A ``(rank, d_in)`` and B ``(d_out, rank)``, detached."""
        return whole(self.A.detach())[:rank], whole(self.B.detach())[:, :rank]

    @torch.no_grad()
    def fill(self, a: Tensor, b: Tensor) -> None:
        """Overwrite the weights, in place and in their shapes: what ``a (k, d_in)`` and ``b (d_out, k)`` lack is zero.

        Directions whose row of A and column of B are zero have no gradient: they stay zero, exactly.

        Raises:
            ValueError: if k exceeds the allocated rank.
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
        """Give the layer new weights of another rank, in place.

        The Parameters stay the same objects, so that every list, hook and optimizer that holds them stays right;
        ``set_`` (not ``.data``) also replaces the stale gradient accumulator of the old shape.

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
    """For each layer, its directions up to the last one that is not zero in both A and B; waits for the device once.

    The weights themselves say which directions are in use, so that nothing else has to be saved and restored.
    """
    counts = []
    for pair in pairs:
        a, b = pair.weights(pair.rank)
        used = (a != 0).any(1) | (b != 0).any(0)
        counts.append((used * torch.arange(1, pair.rank + 1, device=used.device)).amax())
    return torch.stack([c.to(counts[0].device) for c in counts]).tolist() if counts else []
