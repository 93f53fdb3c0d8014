"""Contents of a run's event log: ranks over time, curves, and each layer's position in the model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ctr_optim.report.log import read_events

_EVAL_LOSS = re.compile(r"(eval|val|valid|validation|test)[_/](.*[_/])?loss$")


@dataclass(frozen=True)
class Grid:
    """The layers of a model as a table, with a row for each kind of module and a column for each block.

    Attributes:
        modules: labels of the rows, such as ``"self_attn.q_proj"``.
        blocks: block numbers of the columns.
        names: layer names by cell ``(row, column)``; a cell without a layer has no entry.
    """

    modules: Sequence[str]
    blocks: Sequence[int]
    names: Mapping[tuple[int, int], str]

    def matrix(self, values: Mapping[str, float]) -> list[list[float]]:
        """Return one value per cell, as a list of rows; NaN in cells without a layer or without a value.

        Args:
            values: values by layer name.
        """
        at = {cell: values.get(name, float("nan")) for cell, name in self.names.items()}
        return [[at.get((r, c), float("nan")) for c in range(len(self.blocks))] for r in range(len(self.modules))]


@dataclass(frozen=True)
class Run:
    """Contents of a run's event log.

    Attributes:
        history: ranks by layer name, as ``(step, rank)`` for the start and for each change.
        logs: the ``"log"`` events.
        evals: the ``"eval"`` events.
        name: name of the run, for headings.
    """

    history: Mapping[str, Sequence[tuple[int, int]]]
    logs: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]] = ()
    name: str = "run"

    @property
    def last(self) -> Mapping[str, Any]:
        """The last ``"log"`` event; empty if there is none."""
        return self.logs[-1] if self.logs else {}

    @property
    def last_step(self) -> int:
        """The last step in the event log."""
        written = [entry["step"] for entries in (self.logs, self.evals) for entry in entries[-1:]]
        return max(written + [h[-1][0] for h in self.history.values()], default=0)

    @property
    def event_steps(self) -> list[int]:
        """Steps at which any rank changed."""
        return sorted({step for h in self.history.values() for step, _ in h[1:]})

    @property
    def first_ranks(self) -> dict[str, int]:
        """Rank of every layer at the start of the run."""
        return {name: h[0][1] for name, h in self.history.items()}

    @property
    def last_ranks(self) -> dict[str, int]:
        """Rank of every layer at the end of the run."""
        return {name: h[-1][1] for name, h in self.history.items()}

    def rank(self, layer: str, step: int) -> int:
        """Return a layer's rank after ``step`` steps."""
        return [rank for at, rank in self.history[layer] if at <= max(step, self.history[layer][0][0])][-1]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of a logged number; a step with several values has its last one."""
        entries = [*self.logs, *self.evals]
        found = {entry["step"]: entry[key] for entry in entries if isinstance(entry.get(key), (int, float))}
        return sorted(found), [found[step] for step in sorted(found)]

    @cached_property
    def eval_key(self) -> str | None:
        """The key of the loss on evaluation data, such as ``"eval_loss"``; None if there is none."""
        names = (name for entry in [*self.evals, *self.logs] for name in entry)
        return next((name for name in names if _EVAL_LOSS.match(name)), None)

    def best(self, key: str) -> tuple[int, float] | None:
        """Return step and value at the minimum of a logged number; None if it has no finite value."""
        found = [(value, step) for step, value in zip(*self.series(key), strict=True) if math.isfinite(value)]
        return min(found)[::-1] if found else None

    @cached_property
    def grid(self) -> Grid:
        """The layers as a table of modules and blocks."""
        places = {name: place(name) for name in self.history}
        several = len({stem for stem, block, _ in places.values() if block is not None}) > 1
        labels = {
            name: f"{stem}.*.{module}" if several and block is not None else module
            for name, (stem, block, module) in places.items()
        }
        modules = list(dict.fromkeys(labels.values()))
        blocks = sorted({block or 0 for _, block, _ in places.values()})
        cells = {(modules.index(labels[n]), blocks.index(block or 0)): n for n, (_, block, _) in places.items()}
        return Grid(modules, blocks, cells)


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read the event log of a run.

    Args:
        path: the log file or its directory.

    Raises:
        FileNotFoundError: if there is no log file.
        ValueError: if the file is not an event log.
    """
    history: dict[str, list[tuple[int, int]]] = {}
    events = read_events(path)
    for event in events:
        if event["event"] == "start":
            for name, rank in event["ranks"].items():
                if name not in history or history[name][-1][1] != rank:
                    history.setdefault(name, []).append((event["step"], rank))
        elif event["event"] == "rank":
            history[event["name"]].append((event["step"], event["new_rank"]))
    logs, evals = ([event for event in events if event["event"] == kind] for kind in ("log", "eval"))
    return Run(history, logs, evals, name_of(path))


def name_of(path: str | os.PathLike[str]) -> str:
    """Return the name of a run: the name of its directory."""
    whole = Path(path).resolve()
    return (whole.parent if whole.suffix == ".jsonl" else whole).name


def place(name: str) -> tuple[str, int | None, str]:
    """Return stem, block and module of a layer's name, such as ``("model.layers", 3, "attn.q")``.

    The block is None if the name contains no number.

    Args:
        name: the layer's name, such as ``model.layers.3.attn.q``.
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if found is None:
        return "", None, name
    return name[: found.start()], int(found[1]), name[found.end() :] or name[: found.start()] or name
