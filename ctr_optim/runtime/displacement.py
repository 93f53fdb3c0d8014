"""Parameters that are moved for a while and restored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def moved(
    changes: Sequence[tuple[Sequence[Tensor], Sequence[Tensor] | None]], factor: float | Tensor = 1.0
) -> Iterator[None]:
    """Add ``factor`` times their deltas to parameters within a ``with`` block, then restore them bit for bit.

    Args:
        changes: parameters, and a delta for each; None in the deltas' place sets the parameters to zero.
        factor: a number, or a tensor ``()``.
    """
    saved = [(list(params), [p.clone() for p in params]) for params, _ in changes]
    try:
        for (params, _), (_, delta) in zip(saved, changes, strict=True):
            if delta is None:
                torch._foreach_zero_(params)
            else:
                here = factor.to(delta[0].device) if isinstance(factor, Tensor) else factor
                torch._foreach_add_(params, torch._foreach_mul(list(delta), here))
        yield
    finally:
        for params, values in saved:
            torch._foreach_copy_(params, values)
