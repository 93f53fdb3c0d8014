"""Specifications of runs: dicts whose missing keys have defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def completed(spec: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec with every key, so that equal runs have equal specs.

    Raises:
        ValueError: for an unknown key.
    """
    unknown = set(spec) - set(defaults)
    if unknown:
        raise ValueError(f"spec: unknown keys {sorted(unknown)}; expected some of {sorted(defaults)}")
    return {**defaults, **spec}
