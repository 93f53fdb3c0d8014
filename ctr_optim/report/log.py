"""The event log of a run, the source of all reports: a file with one JSON object per line.

Each object has the keys ``"event"`` and ``"step"``. A ``"start"`` event holds the ranks at the start or resumption of
the run, and a ``"rank"`` event holds one :class:`~ctr_optim.RankEvent`. A ``"log"`` event holds the optimizer's
metrics, and an ``"eval"`` event holds evaluation results, such as ``eval_loss``.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from ctr_optim.optimizer import CTROptimizer
from ctr_optim.ranks.events import RankEvent
from ctr_optim.runtime import distributed

FILE_NAME = "events.jsonl"


class EventLog:
    """Writes the events of a run to a file: each rank change, and metrics at each call of :meth:`log`.

    A resumed run appends to its file. Readers drop entries of an interrupted run after the step of resumption. Only the
    first of several processes writes.

    Args:
        optimizer: the optimizer of the run.
        path: a directory, in which the file is named ``events.jsonl``, or a file that ends in ``.jsonl``.
    """

    def __init__(self, optimizer: CTROptimizer, path: str | os.PathLike[str]) -> None:
        self.path = event_file(path)
        self.optimizer = optimizer
        self._append = partial(_append, self.path if distributed.is_first() else None)
        self._append("start", optimizer.steps, ranks=optimizer.ranks)
        if optimizer.rank_scheduler is not None:
            optimizer.on_rank_event(partial(_rank_moved, self._append))

    def log(self, **values: Any) -> dict[str, Any]:
        """Write the optimizer's metrics together with ``values``, such as the loss, and return the metrics."""
        metrics = self.optimizer.metrics()
        self._append("log", self.optimizer.steps, **values, **metrics)
        return metrics

    def evaluated(self, **values: float) -> None:
        """Write the results of an evaluation, such as ``eval_loss`` in nats per token."""
        self._append("eval", self.optimizer.steps, **values)


def event_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of the log file, for its directory or for itself."""
    return Path(path) if Path(path).suffix == ".jsonl" else Path(path) / FILE_NAME


def read_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the events of a run, without the events that a resumption from an earlier step replaced.

    Args:
        path: the log file or its directory.

    Raises:
        FileNotFoundError: if there is no log file.
        ValueError: if the file has no start event, or a line that is not an event.
    """
    file = event_file(path)
    events: list[dict[str, Any]] = []
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no event log found; use CTRCallback or EventLog to write one")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            event = json.loads(line)
            kind, step = event["event"], event["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}: expected a JSON object with the keys 'event' and 'step' ({error})"
            ) from None
        if kind == "start":
            events = [e for e in events if e["step"] <= step] if step else []
        events.append(event)
    if not events or events[0]["event"] != "start":
        raise ValueError(f"{file}: no start event in it, expected one in the first line; EventLog writes it")
    return events


def scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that a logger can plot: scalars of the whole run, and the mean, smallest and largest rank.

    Args:
        metrics: a result of ``opt.metrics()``.
    """
    shown = ("kl_from_base", "trust/predicted_kl", "trust/max_kl", "trust/scale", "trust/coupling", "skipped_steps")
    ranks = metrics["ranks"].values()
    sometimes = ("budget/used", "budget/limit", "retain/kl", "holdout/loss", "trust/factor/holdout")
    found = {f"ctr/{name}": float(metrics[name]) for name in shown if metrics[name] is not None}
    found |= {f"ctr/{name}": float(metrics[name]) for name in sometimes if metrics.get(name) is not None}
    if ranks:
        found |= {"ctr/mean_rank": sum(ranks) / len(ranks), "ctr/min_rank": min(ranks), "ctr/max_rank": max(ranks)}
    return found


def _append(path: Path | None, event: str, step: int, **values: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step, **values}) + "\n")


def _rank_moved(append: Any, event: RankEvent) -> None:
    append("rank", **event.as_dict())
