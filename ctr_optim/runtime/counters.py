"""Counters of the whole optimizer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Numbers of steps and failures since the run started; checkpoints contain them.

    Attributes:
        steps: calls of ``step()`` with gradients, skipped steps included.
        skipped: steps that changed nothing, because a gradient was not finite.
        failed: matrix decompositions that did not converge.
    """

    steps: int = 0
    skipped: int = 0
    failed: int = 0
