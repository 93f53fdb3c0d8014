"""Registry of export formats. Each format is a command ``ctr-optim export-NAME``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ctr_optim.export.uniform import export_uniform_files


@dataclass(frozen=True)
class Export:
    """One export format.

    Attributes:
        write: function of two directories: an adapter that PEFT saved, and the directory to write.
        help: description of the command, one line.
        report: template of the line that the command prints; ``{}`` is replaced by the value that ``write`` returns.
    """

    write: Callable[[str, str], Any]
    help: str
    report: str = "{}"


EXPORTS: dict[str, Export] = {
    "uniform": Export(
        export_uniform_files,
        "write the adapter with one rank for all layers, for programs that support only one",
        "every layer has rank {}",
    ),
}
