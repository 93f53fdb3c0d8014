"""Live view of a run: one line of text for each entry of its event log."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ctr_optim.report.log import event_file


def follow(path: str | os.PathLike[str], wait: Callable[[], bool]) -> Iterator[str]:
    """Yield a line of text for each existing and each new entry of an event log.

    Args:
        path: the log file or its directory; it need not exist yet.
        wait: function that waits for new entries, called when there are none; it returns False to stop.
    """
    file, place, rest = event_file(path), 0, ""
    while True:
        if file.is_file():
            with file.open(encoding="utf-8") as events:
                events.seek(place)
                new = events.read()
                place = events.tell()
            *lines, rest = (rest + new).split("\n")  # the last line may be incomplete
            yield from (line for line in map(_line, lines) if line)
        if not wait():
            return


def _line(text: str) -> str:
    """Return one line of text for a log entry; empty for invalid and unknown entries."""
    if not text.strip():
        return ""
    try:
        event = json.loads(text)
        kind, step = event["event"], event["step"]
    except (ValueError, KeyError, TypeError):
        return ""
    if kind == "start":
        return f"step {step:6}  starts, {len(event.get('ranks', {}))} LoRA layers"
    if kind == "rank":
        return f"step {step:6}  {event['name']}: rank {event['old_rank']} -> {event['new_rank']}"
    return f"step {step:6}  " + "  ".join(_numbers(event)) if kind in ("log", "eval") else ""


def _numbers(event: Mapping[str, Any]) -> Iterator[str]:
    for name, value in event.items():
        if "loss" in name and isinstance(value, (int, float)):
            yield f"{name} {value:.4f}"
    if event.get("kl_from_base") is not None:
        yield f"KL from base {event['kl_from_base']:.3f}"
    if event.get("trust/max_kl") is not None:
        scale = event["trust/scale"]
        yield f"bound {event['trust/max_kl']:.2g} nats, " + (f"scale {scale:.2g}" if scale < 1 else "not reached")
    if event.get("budget/limit") is not None:
        yield f"budget {event['budget/used']:.2f} of {event['budget/limit']:.2f} nats"
