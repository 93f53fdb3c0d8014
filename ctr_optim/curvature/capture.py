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
from ctr_optim.hooks import Hook
from ctr_optim.lora import LoRAPair


@dataclass
class Sketch:
    """A single-pass randomized sketch of the whitened gradient ``G~ = W_S G W_C^T``, ``G = sum_t g_t x_t^T``.

    ``range_ = G~ Omega`` (d_out, k) and ``corange = Psi^T G~`` (l, d_in) determine its leading singular triples
    (Tropp et al., 2017, arXiv 1609.00048) at the cost of a LoRA of rank k. No gradient of W0 is ever formed.
    """

    range_: Tensor
    corange: Tensor
    omega: Tensor
    psi: Tensor
    input_whitener: Any
    output_whitener: Any
    structure: type[Factor]

    def add_(self, x: Tensor, g: Tensor) -> None:
        """Add tokens: x ``(n, d_in)``, g ``(n, d_out)``."""
        x_t = self.structure.whiten(self.input_whitener, x.mT.to(self.omega.dtype))
        g_t = self.structure.whiten(self.output_whitener, g.mT.to(self.omega.dtype))
        self.range_.add_(g_t @ (x_t.mT @ self.omega))
        self.corange.add_((self.psi.mT @ g_t) @ x_t.mT)


@dataclass
class Stage:
    """Sums over the tokens of one layer since the last ``step()``; tensors are views into a batch of layers."""

    rows: Tensor  # ()          tokens with a gradient
    rank_input: Tensor  # (r, r)      sum h h^T          -> H
    rank_output: Tensor  # (r, r)      sum B^T g g^T B    -> D
    input: Factor  # (d_in, d_in)   sum x x^T   -> C
    output: Factor  # (d_out, d_out) sum g g^T   -> S
    sketch: Sketch | None = None

    @torch.no_grad()
    def add_(self, x: Tensor, h: Tensor, b: Tensor, g: Tensor, stride: int) -> None:
        """Add tokens. x ``(..., d_in)``, h ``(..., r)``, b ``(d_out, r)``, g ``(..., d_out)``, any float dtype."""
        x, h, g = x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1]), g.reshape(-1, g.shape[-1])
        active = (g.abs().amax(-1, keepdim=True) != 0).to(x.dtype)
        weight = stride**0.5  # every kept token stands for `stride` of them
        x = x * (active * weight) if stride > 1 else x * active
        wide = self.rank_input.dtype
        h = h.to(wide) * (active * weight).to(wide)
        g_rank = (g @ b.to(g.dtype)).to(wide) * weight
        with torch.autocast(g.device.type, enabled=False), _NoTF32(g.device):
            self.rows.add_(active.sum(dtype=wide) * stride)
            self.rank_input.add_(h.mT @ h)
            self.rank_output.add_(g_rank.mT @ g_rank)
            self.input.add_rows_(x)
            self.output.add_rows_(g * weight if stride > 1 else g)
            if self.sketch is not None:
                self.sketch.add_(x, g * weight if stride > 1 else g)


class _NoTF32:
    """Full float32 products for Gram matrices, whatever the user chose for the model (a compiled graph keeps it)."""

    def __init__(self, device: torch.device) -> None:
        self.active = device.type == "cuda" and not torch.compiler.is_compiling()

    def __enter__(self) -> None:
        if self.active:
            self.tf32 = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *exc: Any) -> None:
        if self.active:
            torch.backends.cuda.matmul.allow_tf32 = self.tf32


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
        ctx.stage.add_(x, h, b, kept, ctx.stride)
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
        stride = 1 if self.max_tokens is None else -(-x.shape[0] // self.max_tokens)
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
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.stages = [None] * len(self.stages)
