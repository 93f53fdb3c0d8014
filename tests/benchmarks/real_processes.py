"""Worker function of test_real_pool.py. It imports nothing large, so that its processes start fast."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path


def entry(device: str, pipe: Connection, folder: str) -> None:
    """Act as the spec's task says: work, die the first time, die always, or run out of memory."""
    pipe.send("ready")
    while True:
        try:
            spec = pipe.recv()
        except EOFError:
            return
        seen = Path(folder) / f"{spec['task']}-{spec['seed']}"
        before = len(seen.read_text()) if seen.exists() else 0
        seen.write_text("x" * (before + 1))
        if spec["task"] == "dies" or (spec["task"] == "dies once" and not before):
            os._exit(7)
        if spec["task"] == "memory" and before < 2:
            pipe.send({"error": "out of memory", "out_of_memory": True})
        else:
            pipe.send({"loss": float(before)})
        if spec["task"] == "last":
            return
