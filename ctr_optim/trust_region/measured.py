"""Averages of measured ratios, single values of which may be off by a factor of ten."""

from __future__ import annotations

FALL = 4.0  # Largest divisor of an average in one measurement: too long a step costs more than too short a step.
_NEWEST = 0.2  # Smallest weight of a new measurement in an average: single measurements are off by a third.


def newest_share(count: int) -> float:
    """Return the weight of a measurement after ``count`` others; early ones are forgotten fast, as models change."""
    return max(_NEWEST, 5 / (5 + count))


def mixed(before: float | None, new: float, weight: float) -> float:
    """Return the weighted mean of the square roots of the former value and a measurement, squared."""
    return new if before is None else float(((1 - weight) * before**0.5 + weight * new**0.5) ** 2)
