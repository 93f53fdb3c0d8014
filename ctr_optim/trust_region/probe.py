"""Measure, on the model itself, how far a step moves its predictions.

A forward pass of a slice of the last batch at theta + delta, beside what the training's own forward said at theta,
gives the KL divergence of that step, over all layers and positions together. The re-run leaves no trace: no gradients,
random state kept, taps off, training mode and autocast as in the user's own forward, norm statistics and parameters
restored bit for bit. It never raises into the user's loop: ``refused`` says why nothing was measured.
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
from ctr_optim.runtime.hooks import Hook
from ctr_optim.runtime.messages import users_line
from ctr_optim.trust_region.kept import SKIPS_HEAD, Kept
from ctr_optim.trust_region.logits import NO_LOGITS, kl_divergence, logits_of
from ctr_optim.trust_region.loss_tokens import Watch
from ctr_optim.trust_region.protocols import Changes
from ctr_optim.trust_region.rerun import CannotRerun, Generators, common_ancestors

T = TypeVar("T")

_MOST_FAILURES = 3  # in a row; after them the model is not run again
_SAME = 1e-2  # nats; a slice that says something else than its rows of the whole batch did is no part of the batch


class _Failed:
    """What did not work."""


class NoLoss(ValueError):
    """The model's output has no ``.loss``."""


class Probe:
    """Remembers a slice of the last training batch, and re-runs the model on it.

    Attributes:
        enabled: whether the coming forward is kept.
        refused: why the last batch could not be used; None where it could.
    """

    def __init__(self, root: nn.Module, layers: list[nn.Module], share: float = 0.25) -> None:
        self.enabled = False
        self.paused = False
        self.share = share
        self.refused: str | None = None
        self._call: Kept | None = None
        self._depth: int | None = None
        self._checked = False  # whether a slice was seen to say what it said as a part of the batch
        self._failures = 0  # re-runs that failed, in a row
        self._starved = 0  # measurements whose memory did not suffice, in a row
        self._phase = 0
        self._like = next(root.parameters())  # on the device that processes talk through
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
        """Forget the batch: its inputs and logits would take up memory until the next measurement."""
        self._call = None

    @property
    def ready(self) -> bool:
        """Whether there is a batch to re-run, and it is known which of its tokens the loss looks at."""
        if self._call is None:
            return False
        unprepared = self._tried(self._call.prepare)
        if isinstance(unprepared, _Failed):
            return False
        self.refused = unprepared or self.refused
        return unprepared is None

    # -- the training's forward -----------------------------------------------------------------------------------

    def entered(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward; the outermost module that is really called is the one to keep."""
        if self.paused or not self.enabled or not torch.is_grad_enabled() or self._given_up:
            return
        if self._depth is not None and depth > self._depth:
            return
        self._depth = depth
        try:
            self._call = Kept.of(module, args, kwargs, self.share, self._phase)
        except CannotRerun as reason:
            self._call, self.refused = None, str(reason)
        except torch.OutOfMemoryError as error:
            self._call, self.refused = None, _told(error)

    def left(self, depth: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a forward: keep its logits, and learn from the gradient which tokens the loss looks at."""
        if self.paused or self._depth is None:
            return
        call, logits = self._call, logits_of(output)
        if depth > self._depth:  # a wrapper may hand out copies of the logits that the loss does not use
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
        """Logits ``(n, V)`` of some of the slice's tokens, with the parameters as they are now; None where it failed.

        All processes have them or none has.
        """
        if not self._all(self.ready):
            return None
        assert self._call is not None
        found = self._attempt(self._call)
        if self._all(found is not None):
            self._failures, self._checked = 0, True
            return found
        self.share = 1.0  # from now on the whole batch
        self._failed()
        return None

    def logits_in_training(self) -> Tensor | None:
        """The same as the training's own forward had them; by a re-run where they depended on chance or the batch.

        The first slice is run in any case: where that fails, or says something else, the whole batch takes its place.
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
        """``(n,)`` which of these tokens the loss looks at."""
        assert self._call is not None
        return self._call.loss_tokens()

    def moved(self, changes: Changes, factor: float | Tensor = 1.0) -> Moved | None:
        """The parameters displaced until the block ends; None where some process's memory does not suffice."""
        found = self._tried(partial(Moved, changes, factor))
        if self._all(not isinstance(found, _Failed)) and not isinstance(found, _Failed):
            return found
        if not isinstance(found, _Failed):
            found.__exit__()
        self._starve()
        return None

    def divergence(self, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor] | None:
        """KL summed over loss tokens, and their number; None where some process's memory does not suffice."""
        assert self._call is not None
        found = self._tried(partial(kl_divergence, here, there, self._call.loss_tokens()))
        if self._all(not isinstance(found, _Failed)) and not isinstance(found, _Failed):
            self._starved = 0
            return found
        self._starve()
        return None

    def sampled(self, work: Callable[[], T]) -> T | None:
        """What ``work``, which calls :meth:`gradients`, returns; None where it fails for any reason, in any process."""
        found = self._tried(work, Exception)
        if self._all(not isinstance(found, _Failed)) and not isinstance(found, _Failed):
            self._failures = 0
            return found
        self._failed()
        return None

    def gradients(self, params: list[Tensor]) -> list[Tensor]:
        """Gradients of the slice's own loss for ``params``, with the parameters as they are now.

        Raises:
            NoLoss: where the model's output has no ``.loss``.
        """
        assert self._call is not None
        with self._without_trace(self._call), torch.enable_grad():
            loss = getattr(self._call.module(*self._call.args, **self._call.kwargs), "loss", None)
            if loss is None:
                raise NoLoss(
                    "curvature='hutchinson' needs a model that returns its loss (pass labels to it); "
                    "the output has no .loss: use curvature='kfac', which looks at gradients only"
                )
            return list(torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True))

    @torch.no_grad()
    def _attempt(self, call: Kept) -> Tensor | None:
        """Logits of a re-run; None where it fails for any reason, which ``refused`` tells."""
        self._out_of_memory = False
        try:
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
        except Exception as error:
            told = self._refuse(error)
            self.refused = f"{NO_LOGITS}, and without labels: {told}" if call.fused else told
        self._free()
        return None

    def _tried(self, work: Callable[[], T], caught: type[Exception] = torch.OutOfMemoryError) -> T | _Failed:
        """What ``work`` returns in this process, or that it failed; ``refused`` tells why."""
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
        """Give memory back; the traceback, which held the tensors of what failed, is gone by now."""
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
        """After some failures in a row, say so and stop trying."""
        if failures == _MOST_FAILURES:
            self.release()
            warnings.warn(
                f"CTROptimizer could not run the model again to measure the KL of a step, {_MOST_FAILURES} times in a "
                f"row, and stops trying: {self.refused}. The bound rests on the coupling known so far; "
                "metrics()['trust/source'] gives its origin.",
                stacklevel=users_line(),
            )

    def _all(self, condition: bool) -> bool:
        """Whether a condition holds in every process: a forward of sharded parameters needs all of them."""
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
    """Whether a re-run says what the training's forward said, but for rounding."""
    if saved.shape != found.shape:
        return False
    total, count = kl_divergence(saved, found, call.loss_tokens())
    return not float(total) > _SAME * float(count)  # NaN is for the measurement to refuse


def _told(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    text = lines[0][:200] if lines else ""
    if isinstance(error, torch.OutOfMemoryError):
        return "the device's memory does not hold another forward pass"
    return f"{type(error).__name__}: {text}" if not isinstance(error, ValueError) else text
