"""Warnings of the optimizer, which Python attributes to the line of the user's code that led to them."""

from __future__ import annotations

import sys
import warnings


def users_line() -> int:
    """Return the ``stacklevel`` for a warning of the caller: the first frame outside of torch and ctr_optim."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "ctr_optim"):
        frame, level = frame.f_back, level + 1
    return level


class Once:
    """Issues each warning once, independently of Python's warning filters."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def warn(self, message: str) -> None:
        """Issue a warning, unless this object has issued the same message before."""
        if message not in self._given:
            self._given.add(message)
            warnings.warn(message, stacklevel=users_line())


def warn_skipped() -> None:
    """Warn that a step was skipped; by default, Python shows the warning once."""
    warnings.warn(
        "CTROptimizer skipped a step: a gradient was not finite. Parameters, moments and factors are untouched; "
        "metrics()['skipped_steps'] counts such steps.",
        stacklevel=users_line(),
    )


def warn_failed(what: str, instead: str) -> None:
    """Warn that a matrix decomposition did not converge; by default, Python shows the warning once.

    Args:
        what: the matrix, as the object of "could not decompose".
        instead: what the optimizer does instead, a clause.
    """
    warnings.warn(
        f"CTROptimizer could not decompose {what}: {instead}. metrics()['failed_decompositions'] counts such failures.",
        stacklevel=users_line(),
    )


def warn_unmeasured(source: str) -> None:
    """Warn that the KL of a step cannot be measured; by default, Python shows the warning once for each ``source``."""
    warnings.warn(
        f"CTROptimizer cannot measure the KL of its steps; their scale is {source}. It therefore uses AdamW's usual "
        "learning rate. To get a KL bound, let the model's forward() return the scores before the softmax as "
        "output.logits (for a contrastive loss, the similarities), and pass model=... if no single module was found. "
        "Otherwise choose lr=... as for AdamW. See docs/faq.md.",
        stacklevel=users_line(),
    )


def warn_no_gradient(calls: int) -> None:
    """Warn that no parameter had a gradient in any of the first ``calls`` calls of ``step()``."""
    warnings.warn(
        f"CTROptimizer: no parameter has had a gradient in the first {calls} calls of step(), so nothing trains. "
        "Either the trained model has other parameters than the optimizer (the adapter was added later, or the model "
        "was copied), or zero_grad() runs before step(). Add the adapter first, then build the optimizer from the "
        "model that you train.",
        stacklevel=users_line(),
    )


def warn_unbounded(reason: str, lr: float) -> None:
    """Warn that the trust region is switched off; by default, Python shows the warning once.

    Args:
        reason: the option that switches it off.
        lr: the learning rate in use.
    """
    warnings.warn(
        f"{reason}: no trust region here, so the default lr is AdamW's usual learning rate, {lr:g}; pass lr=... to "
        "choose another one.",
        stacklevel=users_line(),
    )


def warn_small_rate(lr: float, share: float) -> None:
    """Warn that the trust region never shortens a step.

    Args:
        lr: the learning rate.
        share: predicted KL of a step over its bound.
    """
    warnings.warn(
        f"CTROptimizer: lr={lr:g} is so small that the trust region never acts: the predicted KL of a step is "
        f"{share:.1e} times its bound. Leave lr out: the default suits every model, and max_kl limits each step. "
        "Learning rates for AdamW (1e-5 to 1e-3) are far too small here.",
        stacklevel=users_line(),
    )
