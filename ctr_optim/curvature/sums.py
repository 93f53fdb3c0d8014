"""Sums over the tokens of a block of layers, filled during the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctr_optim.curvature.factors import Factor
from ctr_optim.curvature.sketch import Sketch
from ctr_optim.runtime.devices import exact


class Sums:
    """Sums over the tokens of a block of L layers since the last ``step()``.

    The backward pass only queues tokens. They are summed for many layers in one call, when the queue is full or the
    sums are read. One launch per layer and term would cost more than the arithmetic.

    Attributes:
        rows: ``(L,)`` number of tokens with a gradient.
        rank_input: ``(L, r, r)`` sum of ``h h^T``, for H.
        rank_output: ``(L, r, r)`` sum of ``B^T g g^T B``, for D.
        input, output: sums of ``x x^T`` and ``g g^T``, for C and S.
        sketch: sketch of the whitened gradient, on the steps before a rank event; else None.
        phase: ``()`` in [0, 1), chooses the tokens that are sampled.
    """

    most_held = 2**24  # most numbers in the queue: 64 MiB in float32

    def __init__(self, rows: Tensor, rank_input: Tensor, rank_output: Tensor, input: Factor, output: Factor) -> None:
        self.rows, self.rank_input, self.rank_output, self.input, self.output = (
            rows,
            rank_input,
            rank_output,
            input,
            output,
        )
        self.sketch: Sketch | None = None
        self.phase = torch.zeros((), device=rows.device, dtype=torch.float32)
        self._waiting: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
        self._held = 0
        self._stride = 1

    @property
    def tensors(self) -> list[Tensor]:
        """All sums, the queued tokens included."""
        self.flush()
        sketched = [] if self.sketch is None else [self.sketch.range_, self.sketch.corange]
        return [self.rows, self.rank_input, self.rank_output, *self.input.tensors, *self.output.tensors, *sketched]

    def add(self, layer: int, x: Tensor, h: Tensor, b: Tensor, g: Tensor, stride: int) -> None:
        """Queue the tokens of one layer.

        Args:
            layer: index of the layer.
            x, h: inputs of A ``(n, d_in)`` and of B ``(n, r)``, in any float dtype.
            b: weight B ``(d_out, r)``.
            g: gradients at B's output, ``(n, d_out)``.
            stride: number of tokens that each of the n tokens represents.
        """
        z = g @ b.to(g.dtype)  # computed now, because FSDP2 may free the gathered B later
        if torch.compiler.is_compiling():  # a list of tensors would break the graph
            self._sum(torch.tensor([layer], device=g.device), x[None], h[None], z[None], g[None], stride)
            return
        if self._waiting and (self._stride != stride or _kind(self._waiting[0][1:]) != _kind((x, h, z, g))):
            self.flush()
        self._waiting.append((layer, x, h, z, g))
        self._stride = stride
        self._held += x.numel() + g.numel()
        if self._held > self.most_held:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Sum the queued tokens, and empty the queue."""
        if self._waiting:
            layers, *tokens = zip(*self._waiting, strict=True)
            index = torch.tensor(layers, device="cpu").to(self.rows.device, non_blocking=True)
            x, h, z, g = (torch.stack(t) for t in tokens)
            with exact([self.rows.device]):
                self._sum(index, x, h, z, g, self._stride)
        self._drop()

    def forget(self) -> None:
        """Set all sums to zero, and empty the queue."""
        self._drop()
        torch._foreach_zero_(self.tensors)

    def keep_if(self, condition: Tensor) -> None:
        """Set all sums to zero unless ``condition ()`` is true, without waiting for the device."""
        for t in self.tensors:
            t.copy_(torch.where(condition.to(t.device), t, 0))

    def _drop(self) -> None:
        self._waiting, self._held = [], 0

    def _sum(self, layers: Tensor, x: Tensor, h: Tensor, z: Tensor, g: Tensor, stride: int) -> None:
        """Add tokens of m layers: x, h, z and g are ``(m, n, width)`` each, with ``z = B^T g`` per token."""
        wide = self.rank_input.dtype
        active = (g != 0).any(-1, keepdim=True)
        # Masking is exact in the tokens' own dtype. Casting x to the sums' dtype first would cost memory traffic.
        x, h, z = x * active, h.to(wide) * active, z.to(wide)
        self.rows.index_add_(0, layers, active.sum((-2, -1)).to(wide), alpha=stride)
        self.rank_input.index_add_(0, layers, h.mT @ h, alpha=stride)
        self.rank_output.index_add_(0, layers, z.mT @ z, alpha=stride)
        for factor, rows in ((self.input, x), (self.output, g)):
            for total, part in zip(factor.tensors, factor.sums(rows, wide), strict=True):
                total.index_add_(0, layers, part, alpha=stride)
        if self.sketch is not None:
            self.sketch.add_(layers, x.to(wide), g.to(wide), stride)


def _kind(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in tensors]
