"""A progress bar for operations that take longer than a few seconds."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from typing import Any

from ctr_optim.runtime import distributed

PATIENCE = 3.0  # seconds before the bar appears


def progress(total: int, what: str) -> Iterator[int]:
    """Yield 0 to ``total - 1``; after three seconds, the first process shows a bar if tqdm is installed.

    Args:
        total: number of items.
        what: label of the bar.
    """
    start, bar = time.monotonic(), None
    for index in range(total):
        yield index
        if bar is not None:
            bar.update()
        elif time.monotonic() - start > PATIENCE and index + 1 < total and distributed.is_first():
            start, bar = float("inf"), _bar(total, index + 1, what)
    if bar is not None:
        bar.close()


def _bar(total: int, done: int, what: str) -> Any:
    try:
        return importlib.import_module("tqdm.auto").tqdm(total=total, initial=done, desc=what)
    except ImportError:
        return None
