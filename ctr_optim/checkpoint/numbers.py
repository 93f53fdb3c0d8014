"""Plain numbers of an optimizer as one flat dict for checkpoints, gathered from the objects that own them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

FORMAT = 2  # version of the dict; 1 had no version


def pack(owners: Iterable[Any]) -> dict[str, Any]:
    """Fields of several dataclasses in one dict, and the version of the format."""
    numbers: dict[str, Any] = {"version": FORMAT}
    for owner in owners:
        numbers |= asdict(owner)
    return numbers


def unpack(numbers: Mapping[str, Any], owners: Iterable[Any]) -> None:
    """Write a packed dict back to its owners; fields that the dict lacks keep their value."""
    for owner in owners:
        for field in fields(owner):
            if field.name in numbers:
                setattr(owner, field.name, numbers[field.name])
