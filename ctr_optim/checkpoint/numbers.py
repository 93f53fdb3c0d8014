"""The optimizer's plain numbers as one flat dict for checkpoints; several dataclasses own these numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

FORMAT = 2  # version of this dict; format 1 has no "version" key


def pack(owners: Iterable[Any]) -> dict[str, Any]:
    """Return the fields of several dataclasses in one dict, together with the version of the format."""
    numbers: dict[str, Any] = {"version": FORMAT}
    for owner in owners:
        numbers |= asdict(owner)
    return numbers


def unpack(numbers: Mapping[str, Any], owners: Iterable[Any]) -> None:
    """Copy a packed dict to its owners.

    A field that the dict lacks gets its default value, which stands for a run that did not have the field. Fields
    without a default keep their value.
    """
    for owner in owners:
        for field in fields(owner):
            value = numbers.get(field.name, field.default)
            if value is not MISSING:
                setattr(owner, field.name, value)
