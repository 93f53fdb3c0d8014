"""Exports of a saved adapter, each of which is a command ``ctr-optim export-NAME``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ctr_optim.export.uniform import export_uniform_files


@dataclass(frozen=True)
class Export:
    """One way to write a saved adapter.

    Attributes:
        write: called with the directory of an adapter that PEFT saved and with the directory to write.
        help: the command's description, one line.
        report: template of the line that the command prints; ``{}`` is the value that ``write`` returns.
    """

    write: Callable[[str, str], Any]
    help: str
    report: str = "{}"


EXPORTS: dict[str, Export] = {
    "uniform": Export(
        export_uniform_files,
        "the same adapter with one rank, for readers that know only one",
        "every layer of rank {}",
    ),
}
