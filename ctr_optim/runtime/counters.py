"""Counters of the optimizer as a whole."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Steps and failures since the run began; checkpoints carry them.

    Attributes:
        steps: steps taken; skipped: steps not taken, since a gradient was not finite.
        failed: matrix decompositions that did not converge.
    """

    steps: int = 0
    skipped: int = 0
    failed: int = 0
