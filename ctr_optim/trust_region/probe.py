"""Measure, on the model itself, how far a step moves its predictions.

A forward pass of a slice of the last batch at theta + delta, beside what the training's own forward said at theta,
gives the KL divergence of that step, over all layers and positions together. The re-run leaves no trace: no gradients,
random state forked, taps off, training mode and autocast as in the user's own forward, norm statistics and parameters
restored bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ctr_optim.runtime import distributed
from ctr_optim.runtime.hooks import Hook
from ctr_optim.trust_region.logits import IGNORED, NO_LOGITS, chunks_of, logits_of, some_rows, stride_of
from ctr_optim.trust_region.rerun import CannotRerun, common_ancestors, nothing_drawn, random_state, take, tensors_in

_FOR_THE_LOSS = ("labels", "shift_labels", "fused_lm_head", "skip_logits")


@dataclass
class _Call:
    """One training forward of the outermost module: what a re-run needs, and what it said."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int
    sequences: int
    autocast: tuple[str, torch.dtype, bool] | None  # None where the device knows none
    random_state: list[Tensor] | None
    logits: Tensor | None = None  # None where a re-run would not have said the same
    loss_masks: dict[int, Tensor] = field(default_factory=dict)  # of each chunk of the logits
    fused: bool = False  # whether the training's forward gave its loss alone

    def halve(self) -> None:
        """Keep half of the sequences: two passes of them cost what one of all would."""
        keep = max(1, self.sequences // 2)
        self.args, self.kwargs = take((self.args, self.kwargs), self.sequences, keep)
        self.sequences = keep

    def ask_for_logits(self) -> bool:
        """Run again without labels, for a model that gives its loss or its logits; False where it was given none.

        Liger's forwards and TRL's fuse the last layer with the loss, so that no logits take up memory: only as many
        rows are asked for as are looked at. Which of them the loss looks at, the labels tell: those of the next token.
        """
        given = {name: self.kwargs.pop(name) for name in _FOR_THE_LOSS if name in self.kwargs}
        shifted, labels = given.get("shift_labels"), given.get("labels")
        if isinstance(shifted, Tensor) and shifted.dim() == 2:
            counts = shifted != IGNORED
        elif isinstance(labels, Tensor) and labels.dim() == 2:
            counts = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
        else:
            return False
        self.fused = True
        if self._passes_on("logits_to_keep"):
            rows = torch.arange(0, counts.shape[1], stride_of(counts.numel()), device=counts.device)
            self.kwargs["logits_to_keep"], counts = rows, counts[:, rows]
        self.loss_masks[0] = counts
        return True

    def _passes_on(self, name: str) -> bool:
        """Whether the forward takes an argument, or takes any and a module within takes this one."""
        outer = signature(type(self.module).forward).parameters
        if name not in outer and not any(p.kind is p.VAR_KEYWORD for p in outer.values()):
            return False
        return any(name in signature(type(m).forward).parameters for m in self.module.modules())

    @cached_property
    def norms(self) -> list[nn.Module]:
        """Those that take statistics of the batch."""
        return [m for m in self.module.modules() if isinstance(m, _NormBase) and m.training]

    @cached_property
    def fsdp(self) -> list[Any]:
        """What FSDP2 wraps."""
        return distributed.fsdp_modules([self.module])


class Probe:
    """Remembers a slice of the last training batch, and re-runs the model on it."""

    def __init__(self, root: nn.Module, layers: list[nn.Module], share: float = 0.25) -> None:
        self.enabled = False
        self.paused = False
        self.share = share
        self.refused: str | None = None
        self._call: _Call | None = None
        self._depth: int | None = None
        self._handles = []
        for depth, module in enumerate(common_ancestors(root, layers)):
            before, after = (Hook(partial(act, depth), id(module)) for act in (self.entered, self.left))
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after))

    def close(self) -> None:
        """Remove the hooks and forget the batch."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._call = None

    @property
    def ready(self) -> bool:
        """Whether there is a batch to re-run."""
        return self._call is not None

    def entered(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward; the outermost module that is really called is the one to keep."""
        if self.paused or not self.enabled or not torch.is_grad_enabled():
            return
        if self._depth is not None and depth > self._depth:
            return
        self._depth = depth
        try:
            self._call = self._slice(module, args, kwargs)
        except CannotRerun as reason:
            self._call, self.refused = None, str(reason)

    def left(self, depth: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a forward: learn from the gradient which tokens the loss looks at."""
        if self.paused or self._depth != depth:
            return
        self._depth = None
        call, logits = self._call, logits_of(output)
        if call is None:
            return
        if logits is None:
            call.halve()
            if not call.ask_for_logits():
                self._call, self.refused = None, NO_LOGITS
        elif logits.requires_grad:
            # chance, and statistics of the whole batch, would say something else the next time
            if nothing_drawn(call.random_state) and not call.norms and logits.shape[0] == call.batch:
                call.logits = some_rows(logits.detach()[: call.sequences]).clone()
            else:
                call.halve()

            def remember(index: int, grad: Tensor) -> None:
                call.loss_masks[index] = (grad[: call.sequences] != 0).any(-1)

            for index, chunk in enumerate(chunks_of(output) or [logits]):
                chunk.register_hook(partial(remember, index))  # type: ignore[no-untyped-call]

    def _slice(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        size = next((t.shape[0] for t in tensors_in((args, kwargs)) if t.dim() > 0), 0)
        keep = max(1, int(size * self.share))
        device = next((t.device.type for t in tensors_in((args, kwargs))), "cpu")
        autocast = None
        if torch.amp.is_autocast_available(device):
            autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        kept_args, kept_kwargs = take((args, kwargs), size, keep)
        return _Call(module, kept_args, kept_kwargs, size, keep, autocast, random_state())

    @torch.no_grad()
    def logits(self) -> Tensor | None:
        """Logits ``(n, V)`` of some of the slice's tokens, evenly spaced, with the parameters as they are now."""
        call = self._call
        if call is None:
            return None
        try:
            with self._without_trace(call):
                logits, trouble = logits_of(call.module(*call.args, **call.kwargs)), NO_LOGITS
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            if not call.fused:
                raise
            logits, trouble = None, f"{NO_LOGITS}, and without labels: {error}"
        if logits is None:
            self.refused = trouble
            return None
        return some_rows(logits)

    def logits_in_training(self) -> Tensor | None:
        """The same as the training's own forward had them; by a re-run where they depended on chance or the batch."""
        return self.logits() if self._call is None or self._call.logits is None else self._call.logits

    def loss_tokens(self, logits: Tensor) -> Tensor:
        """``(n,)`` which of these tokens the loss looks at."""
        masks = self._call.loss_masks if self._call is not None else {}
        if masks:
            mask = some_rows(torch.cat([masks[index] for index in sorted(masks)], -1).unsqueeze(-1)).squeeze(-1)
            if mask.shape == logits.shape[:-1]:
                return mask
        return logits.new_ones(logits.shape[:-1], dtype=torch.bool)

    def gradients(self, params: list[Tensor]) -> list[Tensor]:
        """Gradients of the slice's own loss for ``params``, with the parameters as they are now.

        Raises:
            ValueError: where the model's output has no ``.loss``.
        """
        assert self._call is not None
        with self._without_trace(self._call), torch.enable_grad():
            loss = getattr(self._call.module(*self._call.args, **self._call.kwargs), "loss", None)
            if loss is None:
                raise ValueError(
                    "curvature='hutchinson' needs a model that returns its loss (pass labels to it); "
                    "the output has no .loss: use curvature='kfac', which looks at gradients only"
                )
            return list(torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True))

    @contextmanager
    def _without_trace(self, call: _Call) -> Iterator[None]:
        devices = range(len(random_state() or ()) - 1)
        buffers = [(b, b.clone()) for m in call.norms for b in m.buffers()]
        self.paused = True
        distributed.reshard(call.fsdp)
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.random.fork_rng(devices))
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                if call.autocast is not None:
                    kind, dtype, enabled = call.autocast
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
                yield
        finally:
            self.paused = False
            distributed.reshard(call.fsdp)
            for buffer, before in buffers:
                buffer.copy_(before)
