"""Warnings, each at the user's own line."""

from __future__ import annotations

import sys
import warnings


def users_line() -> int:
    """The ``stacklevel`` of a warning given by the caller: the first line that is neither torch's nor ours."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "ctr_optim"):
        frame, level = frame.f_back, level + 1
    return level


class Once:
    """Gives each warning once, whatever Python's filters say."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def warn(self, message: str) -> None:
        """Warn, unless this message was given before."""
        if message not in self._given:
            self._given.add(message)
            warnings.warn(message, stacklevel=users_line())


def warn_skipped() -> None:
    """Tell the user about a step that was not taken; Python shows it once."""
    warnings.warn(
        "CTROptimizer skipped a step: a gradient was not finite. Parameters, moments and factors are untouched; "
        "metrics()['skipped_steps'] counts such steps.",
        stacklevel=users_line(),
    )


def warn_failed(what: str, instead: str) -> None:
    """Tell the user about a matrix decomposition that did not converge; Python shows it once."""
    warnings.warn(
        f"CTROptimizer could not decompose {what}: {instead}. metrics()['failed_decompositions'] counts such failures.",
        stacklevel=users_line(),
    )


def warn_unmeasured(source: str) -> None:
    """Warn that steps cannot be bounded in nats; Python shows the warning once for each reason."""
    warnings.warn(
        f"CTROptimizer cannot measure the KL of its steps here, scale {source}: it steps at AdamW's everyday rate "
        "instead. To have a bound, let the model's forward return its scores before the softmax as output.logits (of a "
        "contrastive loss: the similarities), and pass model=... if no single module was found. Or give lr=..., chosen "
        "as for AdamW. docs/faq.md tells more.",
        stacklevel=users_line(),
    )


def warn_no_gradient(calls: int) -> None:
    """Warn that ``calls`` calls of ``step()``, all so far, found no gradient in any parameter."""
    warnings.warn(
        f"CTROptimizer: no parameter has had a gradient in the first {calls} calls of step(), so that nothing trains. "
        "The optimizer owns other parameters than the model that trains (an adapter added later, a copy of the model), "
        "or zero_grad() runs before step(). Build the optimizer from the model that trains, after its adapter.",
        stacklevel=users_line(),
    )


def warn_unbounded(reason: str, lr: float) -> None:
    """Warn that no trust region holds; Python shows the warning once."""
    warnings.warn(
        f"{reason}: no trust region here, so that the default lr is AdamW's everyday rate, {lr:g}; give lr=... to "
        "choose another rate.",
        stacklevel=users_line(),
    )


def warn_small_rate(lr: float, share: float) -> None:
    """Warn that the trust region never acts, since the predicted KL of a step is ``share`` of its bound."""
    warnings.warn(
        f"CTROptimizer: lr={lr:g} is so small that the trust region never acts: a step's predicted KL is "
        f"{share:.1e} of max_kl. Leave lr out: the default suits every model, and max_kl limits each step. Rates "
        "that AdamW needs (1e-5 to 1e-3) are far too small here.",
        stacklevel=users_line(),
    )
