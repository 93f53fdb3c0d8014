"""Temporary displacement of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Moved:
    """Context manager that displaces parameters by ``factor`` times their deltas, and restores them at the end.

    The constructor allocates all memory and displaces the parameters. If it raises, it restores them first.

    Args:
        changes: pairs of parameters and their deltas, of equal shapes; None instead of deltas sets the parameters to 0.
        factor: a number or a ``()`` tensor.
    """

    def __init__(
        self, changes: Sequence[tuple[Sequence[Tensor], Sequence[Tensor] | None]], factor: float | Tensor = 1.0
    ) -> None:
        self._saved = [(list(params), [p.clone() for p in params]) for params, _ in changes]
        try:
            for (params, _), (_, delta) in zip(self._saved, changes, strict=True):
                if delta is None:
                    torch._foreach_zero_(params)
                else:
                    here = factor.to(delta[0].device) if isinstance(factor, Tensor) else factor
                    torch._foreach_add_(params, torch._foreach_mul(list(delta), here))
        except BaseException:
            self._restore()
            raise

    def __enter__(self) -> None:
        """Do nothing: the constructor has displaced the parameters."""

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for params, values in self._saved:
            torch._foreach_copy_(params, values)
