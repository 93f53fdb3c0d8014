"""Taps on LoRA layers: sums over tokens, taken during backward, that become Kronecker factors in ``step()``.

One tap sits on the output of each B and sees everything at once: the layer's input x, ``h = A x``, and the
gradient g at B's output. (g is ``s`` times the gradient at the layer's own output; we let the output factor carry
``s^2``, so that the scaling appears nowhere else.) Tokens with ``g = 0`` - padding, prompts behind the last loss
token - count for nothing.

Sums are *staged* here and committed by the optimizer: a step that is skipped leaves the factors alone, and
micro-batches simply add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ctr_optim.curvature.factors import Factor
from ctr_optim.devices import exact
from ctr_optim.hooks import Hook
from ctr_optim.lora import LoRAPair


class Sums:
    """Sums over the tokens of a block of L layers since the last ``step()``, batch dimension first.

    Backward only sets tokens aside; they are summed for many layers at once, when enough have come together or
    somebody asks. A launch a layer for each term would cost more than all the arithmetic.

    Attributes:
        rows: ``(L,)`` tokens with a gradient.
        rank_input: ``(L, r, r)`` sum of ``h h^T``, for H.
        rank_output: ``(L, r, r)`` sum of ``B^T g g^T B``, for D.
        input, output: sums of ``x x^T`` and ``g g^T``, for C and S.
        sketch: of the whitened gradient, on the steps before a rank event.
    """

    most_held = 2**24  # numbers set aside before they are summed: 64 MiB in float32

    def __init__(self, rows: Tensor, rank_input: Tensor, rank_output: Tensor, input: Factor, output: Factor) -> None:
        self.rows, self.rank_input, self.rank_output, self.input, self.output = (
            rows,
            rank_input,
            rank_output,
            input,
            output,
        )
        self.sketch: Sketch | None = None
        self._waiting: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
        self._held = 0
        self._stride = 1

    @property
    def tensors(self) -> list[Tensor]:
        """Everything summed so far."""
        self.flush()
        sketched = [] if self.sketch is None else [self.sketch.range_, self.sketch.corange]
        return [self.rows, self.rank_input, self.rank_output, *self.input.tensors, *self.output.tensors, *sketched]

    def add(self, layer: int, x: Tensor, h: Tensor, b: Tensor, g: Tensor, stride: int) -> None:
        """Tokens of one layer: x ``(n, d_in)``, h ``(n, r)``, b ``(d_out, r)``, g ``(n, d_out)``, any float dtype.

        Every one of them stands for ``stride`` tokens.
        """
        z = g @ b.to(g.dtype)  # now: a sharded B may be gone later
        if torch.compiler.is_compiling():  # one graph, no lists
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
        """Sum what was set aside."""
        if self._waiting:
            layers, *tokens = zip(*self._waiting, strict=True)
            index = torch.tensor(layers, device="cpu").to(self.rows.device, non_blocking=True)
            x, h, z, g = (torch.stack(t) for t in tokens)
            with exact([self.rows.device]):
                self._sum(index, x, h, z, g, self._stride)
        self._drop()

    def forget(self) -> None:
        """Begin anew."""
        self._drop()
        torch._foreach_zero_(self.tensors)

    def keep_if(self, condition: Tensor) -> None:
        """Begin anew unless ``condition`` holds, without waiting for the device to say."""
        for t in self.tensors:
            t.copy_(torch.where(condition.to(t.device), t, 0))

    def _drop(self) -> None:
        self._waiting, self._held = [], 0

    def _sum(self, layers: Tensor, x: Tensor, h: Tensor, z: Tensor, g: Tensor, stride: int) -> None:
        """Add tokens of k layers: ``(k, n, width)`` each."""
        wide = self.rank_input.dtype
        active = (g != 0).any(-1, keepdim=True)
        # in their own precision, for masking is exact there: what is wide is read and written as seldom as can be
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


@dataclass
class Sketch:
    """A single-pass randomized sketch of the whitened gradients ``G~ = W_S G W_C^T``, ``G = sum_t g_t x_t^T``.

    ``G~ Omega`` and ``Psi^T G~`` determine its leading singular triples (Tropp et al., 2017, arXiv 1609.00048) at the
    cost of a LoRA of rank k. No gradient of W0 is ever formed, and tokens are never whitened: the test matrices are, on
    one side, and the sums (:meth:`whitened`) on the other.

    Attributes:
        range_: ``G W_C^T Omega`` (L, d_out, k).
        corange: ``Psi^T W_S G`` (L, l, d_in).
    """

    range_: Tensor
    corange: Tensor
    omega: Tensor
    psi: Tensor
    structure: type[Factor]

    def aim(self, input_whitener: Any, output_whitener: Any) -> None:
        """Whiten what comes from now on so."""
        self._whiteners = input_whitener, output_whitener
        self._right = self.structure.whiten(input_whitener, self.omega, transpose=True)
        self._left = self.structure.whiten(output_whitener, self.psi, transpose=True)

    def add_(self, layers: Tensor, x: Tensor, g: Tensor, stride: int) -> None:
        """Add tokens of k layers, each of which stands for ``stride``: x ``(k, n, d_in)``, g ``(k, n, d_out)``."""
        self.range_.index_add_(0, layers, g.mT @ (x @ self._right[layers]), alpha=stride)
        self.corange.index_add_(0, layers, (g @ self._left[layers]).mT @ x, alpha=stride)

    def whitened(self) -> tuple[Tensor, Tensor]:
        """``G~ Omega`` and ``Psi^T G~``."""
        w_in, w_out = self._whiteners
        return self.structure.whiten(w_out, self.range_), self.structure.whiten(w_in, self.corange.mT).mT


def of_layers(whitener: Any, index: Any) -> Any:
    """The part of a batch's whitener that belongs to one layer, or to some."""
    return whitener[index] if isinstance(whitener, Tensor) else tuple(w[index] for w in whitener)


@dataclass(frozen=True)
class Stage:
    """Where a layer's tokens go: its place in the sums of its block."""

    sums: Sums
    layer: int


class _Tap(torch.autograd.Function):
    """The identity; its backward adds to a stage.

    Outside autocast x and h are what the LoRA layer saves itself, and nothing more is kept.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, h: Tensor, b: Tensor, stage: Stage, stride: int) -> Tensor:
        ctx.save_for_backward(x, h, b)
        ctx.stage, ctx.stride = stage, stride
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, h, b = ctx.saved_tensors
        kept = grad.reshape(-1, grad.shape[-1])[:: ctx.stride]
        # a part is copied out, for a view would keep the whole gradient alive until the tokens are summed
        kept = kept if ctx.stride == 1 else kept.clone()
        ctx.stage.sums.add(ctx.stage.layer, x, h, b, kept, ctx.stride)
        return grad, None, None, None, None, None


class Taps:
    """The forward hooks of all pairs.

    The model's hooks hold this object, and it holds nothing of the optimizer: the owner closes it when it goes.
    """

    def __init__(self, pairs: Sequence[LoRAPair], max_tokens: int | None) -> None:
        self.enabled = False
        self.max_tokens = max_tokens
        self.stages: list[Stage | None] = [None] * len(pairs)
        self._inputs: list[Tensor | None] = [None] * len(pairs)
        self._handles: list[RemovableHandle] = []
        for index, pair in enumerate(pairs):
            for module, seen in ((pair.down, self._seen_down), (pair.up, self._seen_up)):
                self._handles.append(module.register_forward_hook(Hook(partial(seen, index), id(module))))

    def _seen_down(self, index: int, module: nn.Module, args: tuple[Any, ...], h: Tensor) -> None:
        if self.enabled and torch.is_grad_enabled() and self.stages[index] is not None:
            self._inputs[index] = args[0]

    def _seen_up(self, index: int, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        x, self._inputs[index] = self._inputs[index], None
        if x is None or not out.requires_grad:
            return None
        stage = self.stages[index]
        assert stage is not None
        h = args[0].detach().reshape(-1, args[0].shape[-1])
        x = x.detach().reshape(-1, x.shape[-1])
        stride = 1 if self.max_tokens is None else max(1, -(-x.shape[0] // self.max_tokens))
        weight: Tensor = module.weight  # type: ignore[assignment]
        # in h's dtype: under autocast the layer keeps a copy of x in half precision, and so do we; a part of the tokens
        # is copied out, for a view would keep the whole alive
        x = x[::stride].to(h.dtype, copy=stride > 1)
        return _Tap.apply(out, x, h[::stride], weight.detach(), stage, stride)  # type: ignore

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let forwards pass unseen for a while."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    def close(self) -> None:
        """Remove every hook; there is nothing to arm from then on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.enabled, self.stages = False, []
