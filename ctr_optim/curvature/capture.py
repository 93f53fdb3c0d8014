"""Hooks on LoRA layers that sum statistics over tokens during the backward pass.

A *tap* is an autograd function at the output of each B. Its backward pass has the layer's input x, ``h = A x`` and
the gradient g at B's output. g is ``s`` times the gradient at the layer's own output. Therefore the output factor S
contains ``s^2``, and the scaling appears nowhere else. Tokens with ``g = 0`` (padding, for example) add nothing.

The sums are *staged* until ``step()`` commits them to the Kronecker factors. Therefore a skipped step leaves the
factors unchanged, and micro-batches add up.
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

from ctr_optim.curvature.sums import Sums
from ctr_optim.model.pair import LoRAPair
from ctr_optim.runtime.hooks import Hook

_GOLDEN = 0.6180339887  # shift of the place within a stride from one sampled token to the next
_TURN = 0.7548776662  # shift of the phase from one step to the next


@dataclass(frozen=True)
class Stage:
    """The sums of a block, and the index of one layer in them."""

    sums: Sums
    layer: int


def sample(tokens: int, stride: int, phase: Tensor) -> Tensor:
    """Return the index of one token out of every ``stride``, at a place that changes from one stride to the next.

    A fixed place would sample the same positions of every sequence if ``stride`` divides the sequence length.
    Multiples of the golden ratio spread the places evenly.

    Args:
        tokens: number of tokens.
        stride: number of tokens that each sampled token represents.
        phase: ``()`` in [0, 1), on the tokens' device.

    Returns:
        ``(ceil(tokens / stride),)`` int64, ascending.
    """
    index = torch.arange(-(-tokens // stride), device=phase.device)
    place = ((index * _GOLDEN + phase) % 1 * stride).long()
    return (index * stride + place).clamp_max(tokens - 1)


class _Tap(torch.autograd.Function):
    """The identity function; its backward pass adds the tokens to a stage.

    Without autocast and sampling, the LoRA layer itself also saves x and h, so that this needs no extra memory.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, h: Tensor, b: Tensor, picked: Tensor | None, stage: Stage, stride: int
    ) -> Tensor:
        ctx.save_for_backward(x, h, b, picked)
        ctx.stage, ctx.stride = stage, stride
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, h, b, picked = ctx.saved_tensors
        kept = grad.reshape(-1, grad.shape[-1])
        # Indexing copies the sampled rows. A view would keep the whole gradient alive until the tokens are summed.
        kept = kept if picked is None else kept[picked]
        ctx.stage.sums.add(ctx.stage.layer, x, h, b, kept, ctx.stride)
        return grad, None, None, None, None, None, None


class Taps:
    """The forward hooks of all pairs.

    The model's hooks keep this object alive, so it must not reference the optimizer. The owner calls :meth:`close`.

    Args:
        pairs: the LoRA layers.
        max_tokens: most tokens that each layer samples per forward pass; None for all.

    Attributes:
        enabled: whether forward passes are observed.
        stages: the stage of each pair, None until it is set; empty after :meth:`close`.
    """

    def __init__(self, pairs: Sequence[LoRAPair], max_tokens: int | None) -> None:
        self.enabled = False
        self.max_tokens = max_tokens
        self.stages: list[Stage | None] = [None] * len(pairs)
        self._inputs: list[Tensor | None] = [None] * len(pairs)
        self._samples: dict[tuple[int, torch.device], Tensor] = {}  # this step's indices, by token count and device
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
        picked = None if stride == 1 else self._picked(x.shape[0], stride, stage.sums.phase)
        if picked is not None:
            x, h = x[picked], h[picked]
        # h's dtype saves memory under autocast, where the layer also uses x in half precision.
        return _Tap.apply(out, x.to(h.dtype), h, weight.detach(), picked, stage, stride)  # type: ignore

    def turn(self, step: int) -> None:
        """Sample other tokens than in the previous step.

        Within one step the sample is fixed, so that gradient checkpointing recomputes the same tokens.
        """
        self._samples.clear()
        for sums in {id(stage.sums): stage.sums for stage in self.stages if stage is not None}.values():
            sums.phase.fill_(step * _TURN % 1)  # a tensor, so that compiled graphs need no recompilation

    def _picked(self, tokens: int, stride: int, phase: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return sample(tokens, stride, phase)
        key = tokens, phase.device
        if key not in self._samples:
            self._samples[key] = sample(tokens, stride, phase)
        return self._samples[key]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context in which forward passes are not observed."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    def close(self) -> None:
        """Remove every hook permanently."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.enabled, self.stages = False, []
