"""Measure the KL divergence of a step on the model itself.

The KL compares the logits of the training's forward pass at theta with those of a re-run at theta + delta, on a slice
of the last batch. It covers all layers and positions together. A re-run has no side effects: it computes no gradients
and no statistics, uses the training's mode and autocast, and restores random generators, normalisation statistics and
parameters bit for bit. Failures raise no error in the user's loop; ``refused`` gives the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ctr_optim.runtime import distributed
from ctr_optim.runtime.displacement import Moved
from ctr_optim.runtime.hooks import Hook, in_backward
from ctr_optim.runtime.messages import users_line
from ctr_optim.trust_region.kept import SKIPS_HEAD, Kept
from ctr_optim.trust_region.logits import NO_LOGITS, kl_divergence, logits_of
from ctr_optim.trust_region.loss_scale import LossScale
from ctr_optim.trust_region.loss_tokens import Watch
from ctr_optim.trust_region.protocols import Changes
from ctr_optim.trust_region.rerun import CannotRerun, Generators, common_ancestors

T = TypeVar("T")

_MOST_FAILURES = 3  # After this many failures in a row, the probe stops.
_SAME = 1e-2  # Nats per token: above this KL between a slice and the whole batch's rows, the slice is not valid.
_HIDDEN = (
    "autograd finds no parameter that the loss depends on, as with reentrant gradient checkpointing: pass "
    "gradient_checkpointing_kwargs={'use_reentrant': False}"
)


class _Failed:
    """Result of work that raised an error."""


class NoLoss(ValueError):
    """Error for a model whose output has no ``.loss``."""


class Probe:
    """Stores a slice of the last training batch, and re-runs the model on it.

    Args:
        root: module that contains all trained parameters.
        layers: modules that own the trained parameters.
        share: share of a batch's sequences that a re-run uses, in (0, 1].
        loss_scale: observes the logits' gradients in every training step; None: nothing does.
        others: whether to compare tokens outside the loss too.

    Attributes:
        enabled: whether to store the coming forward pass.
        refused: reason of the last failure; None before any failure.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: list[nn.Module],
        share: float = 0.25,
        loss_scale: LossScale | None = None,
        others: bool = False,
    ) -> None:
        self.enabled = False
        self.loss_scale = loss_scale
        self.paused = False
        self.share, self.others = share, others
        self.refused: str | None = None
        self._call: Kept | None = None
        self._depth: int | None = None
        self._checked = False  # whether a re-run of a slice succeeded and gave the training's logits
        self._failures = 0  # number of failed re-runs in a row
        self._starved = 0  # number of measurements in a row that ran out of memory
        self._phase = 0
        self._like = next(root.parameters())  # on the device of collective communication
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
        self.release()

    def release(self) -> None:
        """Drop the stored batch, whose inputs and logits use memory."""
        self._call = None

    @property
    def ready(self) -> bool:
        """Whether a batch is stored, and the tokens that the loss uses are known."""
        if self._call is None:
            return False
        unprepared = self._tried(self._call.prepare)
        if isinstance(unprepared, _Failed):
            return False
        self.refused = unprepared or self.refused
        return unprepared is None

    # -- the training's forward pass ------------------------------------------------------------------------------

    def entered(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the inputs before a forward pass of the outermost module that training calls."""
        if self.paused or not self.enabled or not torch.is_grad_enabled() or self._given_up:
            return
        if self._depth is not None and depth > self._depth:
            return
        if self._call is not None and in_backward():  # Checkpointing recomputes a pass, perhaps not to its end.
            return
        self._depth = depth
        try:
            self._call = Kept.of(module, args, kwargs, self.share, self._phase, self.others)
        except CannotRerun as reason:
            self._call, self.refused = None, str(reason)
        except torch.OutOfMemoryError as error:
            self._call, self.refused = None, _told(error)

    def left(self, depth: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Store the logits after a forward pass, and hook their gradient to find the tokens that the loss uses."""
        observed = self.loss_scale if torch.is_grad_enabled() else None
        if self.paused or (self._depth is None and observed is None):
            return
        call, logits = self._call, logits_of(output)
        if observed is not None and logits is not None:
            observed.see(depth, logits)
        if self._depth is None:
            return
        if depth > self._depth:  # A wrapper may return copies of the logits that the loss does not use.
            if call is not None and logits is not None:
                call.watches.append(Watch(logits))
            return
        self._depth = None
        if call is None:
            return
        try:
            if logits is not None:
                call.said(logits)
            elif not call.said_nothing():
                self._call, self.refused = None, NO_LOGITS
        except torch.OutOfMemoryError as error:
            self._call, self.refused = None, _told(error)

    # -- re-runs --------------------------------------------------------------------------------------------------

    def logits(self) -> Tensor | None:
        """Return ``(n, V)`` logits of the compared tokens with the current parameters; None if a process failed."""
        if not self._all(self.ready):
            return None
        assert self._call is not None
        found = self._attempt(self._call)
        if self._all(found is not None):
            self._failures, self._checked = 0, True
            return found
        self.share = 1.0  # Use whole batches from now on.
        self._failed()
        return None

    def logits_in_training(self) -> Tensor | None:
        """Return ``(n, V)`` the same tokens' logits in training; None if a process failed.

        A re-run replaces the stored logits if they depend on dropout or batch statistics. The first slice is always
        re-run. If that fails or gives other logits, the whole batch is used from then on.
        """
        if not self._all(self.ready):
            return None
        call = self._call
        assert call is not None
        self._phase += 1
        saved = call.logits if self._all(call.logits is not None) else None
        if saved is not None and self._checked:
            return saved
        found = self._attempt(call)
        alike = found is not None and (saved is None or self._tried(partial(_alike, saved, found, call)) is True)
        if not self._all(alike):
            wider = call.batch is not None and not self._out_of_memory and self._tried(call.widen) is True
            self.share = 1.0
            if self._all(wider or call.batch is None):
                found = self._attempt(call)
        if self._all(found is not None):
            self._failures, self._checked = 0, True
            return found
        self._failed()
        return None

    def loss_tokens(self, logits: Tensor) -> Tensor:
        """Return ``(n,)`` whether the loss uses each compared token."""
        assert self._call is not None
        return self._call.loss_tokens()

    def moved(self, changes: Changes, factor: float | Tensor = 1.0) -> Moved | None:
        """Displace the parameters by ``factor`` times ``changes``; return a context that restores them.

        Returns None, with the parameters restored, if a process runs out of memory.
        """
        found = self._tried(partial(Moved, changes, factor))
        if self._all(not isinstance(found, _Failed)) and not isinstance(found, _Failed):
            return found
        if not isinstance(found, _Failed):
            found.__exit__()
        self._starve()
        return None

    def divergence(self, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return ``()`` the KL summed over loss tokens, in nats, and ``()`` their number; None if memory runs out."""
        assert self._call is not None
        found = self._tried(partial(kl_divergence, here, there, self._call.loss_tokens()))
        if self._all(not isinstance(found, _Failed)) and not isinstance(found, _Failed):
            self._starved = 0
            return found
        self._starve()
        return None

    def divergence_outside(self, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return ``()`` the KL summed over compared tokens outside the loss, and ``()`` their number.

        None if this process has no such tokens, or its memory runs out; the other processes then measure without it.
        """
        assert self._call is not None
        counts = self._call.other_tokens()
        if counts is None:
            return None
        found = self._tried(partial(kl_divergence, here, there, counts))
        return None if isinstance(found, _Failed) else found

    def sampled(self, work: Callable[[], T]) -> T | None:
        """Return the result of ``work``, which calls :meth:`gradients`; None if it fails in any process."""
        found = self._tried(work, Exception)
        if self._all(not isinstance(found, _Failed)) and not isinstance(found, _Failed):
            self._failures = 0
            return found
        self._failed()
        return None

    def gradients(self, params: list[Tensor]) -> list[Tensor]:
        """Return the gradients of the slice's loss for ``params``, with the current parameters.

        Raises:
            NoLoss: if the model's output has no ``.loss``.
            RuntimeError: if the loss depends on no parameter, as far as autograd can see.
        """
        assert self._call is not None
        with self._without_trace(self._call), torch.enable_grad():
            loss = getattr(self._call.module(*self._call.args, **self._call.kwargs), "loss", None)
            if loss is None:
                raise NoLoss(
                    "curvature='hutchinson' needs a model that returns its loss (pass labels to it); "
                    "the output has no .loss: use curvature='kfac', which needs only gradients"
                )
            grads = torch.autograd.grad(loss, params, allow_unused=True)
            if all(g is None for g in grads):
                raise RuntimeError(_HIDDEN)
            return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]

    def logits_with_graph(self) -> Tensor:
        """Return ``(n, V)`` logits of the compared tokens with the current parameters, to differentiate.

        Raises:
            RuntimeError: if the slice cannot be run again.
        """
        with torch.enable_grad():
            found = None if self._call is None else self._rerun(self._call)
        if found is None:
            raise RuntimeError(self.refused or NO_LOGITS)
        return found

    @torch.no_grad()
    def _attempt(self, call: Kept) -> Tensor | None:
        """Return the compared logits of a re-run; on any failure return None and set ``refused``."""
        self._out_of_memory = False
        try:
            return self._rerun(call)
        except Exception as error:
            told = self._refuse(error)
            self.refused = f"{NO_LOGITS}, and without labels: {told}" if call.fused else told
        self._free()
        return None

    def _rerun(self, call: Kept) -> Tensor | None:
        """Return the compared logits of a re-run; None, with the reason in ``refused``, if the model gives none."""
        args, kwargs = call.inputs_for_logits()
        with self._without_trace(call):
            logits = logits_of(call.module(*args, **kwargs))
        if logits is None:
            self.refused = NO_LOGITS
            return None
        found = call.compared(logits.whole())
        if found is None:
            self.refused = "the model's logits have another shape for a part of the batch"
        return found

    def _tried(self, work: Callable[[], T], caught: type[Exception] = torch.OutOfMemoryError) -> T | _Failed:
        """Return the result of ``work`` in this process; on failure return ``_Failed()`` and set ``refused``."""
        self._out_of_memory = False
        try:
            return work()
        except NoLoss:
            raise
        except caught as error:
            self._refuse(error)
        self._free()
        return _Failed()

    def _refuse(self, error: Exception) -> str:
        self._out_of_memory = isinstance(error, torch.OutOfMemoryError)
        self.refused = _told(error)
        return self.refused

    def _free(self) -> None:
        """Release cached memory after an out-of-memory error, once no traceback refers to the failed tensors."""
        if self._out_of_memory and self._like.is_cuda:
            torch.cuda.empty_cache()

    @property
    def _given_up(self) -> bool:
        return max(self._failures, self._starved) >= _MOST_FAILURES

    def _starve(self) -> None:
        self._starved += 1
        self._end(self._starved)

    def _failed(self) -> None:
        self._failures += 1
        self._end(self._failures)

    def _end(self, failures: int) -> None:
        """Warn once the probe stops after too many failures in a row."""
        if failures == _MOST_FAILURES:
            self.release()
            warnings.warn(
                f"CTROptimizer could not run the model again to measure the KL of a step, {_MOST_FAILURES} times in a "
                f"row, and stops trying: {self.refused}. The bound uses the last known coupling; "
                "metrics()['trust/source'] gives its source.",
                stacklevel=users_line(),
            )

    def _all(self, condition: bool) -> bool:
        """Return whether a condition holds in every process: sharded forward passes need all processes."""
        if distributed.world_size() == 1:
            return condition
        return bool(distributed.everywhere(condition, distributed.local(self._like)))

    @contextmanager
    def _without_trace(self, call: Kept) -> Iterator[None]:
        before = Generators()
        buffers = [(b, b.clone()) for m in call.norms for b in m.buffers()]
        self.paused = True
        distributed.reshard(call.fsdp)
        if call.headless:
            setattr(call.module, SKIPS_HEAD, False)
        try:
            with ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                if call.autocast is not None:
                    kind, dtype, enabled = call.autocast
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
                yield
        finally:
            self.paused = False
            if call.headless:
                setattr(call.module, SKIPS_HEAD, True)
            before.restore()
            distributed.reshard(call.fsdp)
            for buffer, value in buffers:
                buffer.copy_(value)


def _alike(saved: Tensor, found: Tensor, call: Kept) -> bool:
    """Return whether a re-run's logits equal those of the training's forward pass, except for rounding."""
    if saved.shape != found.shape:
        return False
    total, count = kl_divergence(saved, found, call.loss_tokens())
    return not float(total) > _SAME * float(count)  # The measurement itself rejects NaN.


def _told(error: Exception) -> str:
    """Return an error's message in one line."""
    lines = str(error).strip().splitlines()
    text = lines[0][:200] if lines else ""
    if isinstance(error, torch.OutOfMemoryError):
        return "the device's memory does not hold another forward pass"
    return f"{type(error).__name__}: {text}" if not isinstance(error, ValueError) else text
