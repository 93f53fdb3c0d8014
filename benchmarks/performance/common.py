"""Clocks, memory measurement and JSON lines of the performance programs."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctr_optim import CTROptimizer
from ctr_optim.settings import calibration_due, due

PACKAGES = ("torch", "transformers", "peft", "pytorch_optimizer", "ctr_optim")


class Clock:
    """A clock with CUDA events on a GPU and wall-clock time on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Return a point in time without waiting for the device."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two marks; both must have passed."""
        return float(start.elapsed_time(end)) if self.cuda else 1e3 * (end - start)

    def alone(self, work: Callable[[], Any]) -> float:
        """Return the milliseconds of ``work``, from an idle device to an idle device."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return 1e3 * (time.perf_counter() - start)


def command() -> str:
    """Return the running program with its arguments, without the folder that it lies in."""
    spec = sys.modules["__main__"].__spec__
    program = Path(sys.argv[0]).name if spec is None else f"python -m {spec.name}"
    return " ".join([program, *sys.argv[1:]])


class Report:
    """Writes JSON lines with versions, device and command line, and prints progress."""

    def __init__(self, out: str | None, device: torch.device, **fixed: Any) -> None:
        self.path = None if out is None else Path(out)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()
        self.fixed = {**fixed, "device": device_name(device), "versions": versions(), "command": command()}
        self.lines: list[dict[str, Any]] = []

    def add(self, what: str, **values: Any) -> None:
        """Write one result of kind ``what``."""
        self.lines.append({"what": what, **values})
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"what": what, **values, **self.fixed}) + "\n")
        self.say(what + " " + " ".join(f"{k}={_short(v)}" for k, v in values.items()))

    def say(self, text: str) -> None:
        """Print a progress text."""
        print(f"[{self.elapsed:6.1f} s] {text}", flush=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started


def versions() -> dict[str, str]:
    """Return the versions of Python and of the measured packages."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = str(getattr(sys.modules.get(name), "__version__", "absent"))
    return found


def device_name(device: torch.device) -> str:
    """Return the device's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of all tensors in ``tensors``, including nested lists and dicts."""
    total = 0
    for t in tensors:
        if isinstance(t, Tensor):
            total += t.numel() * t.element_size()
        elif isinstance(t, (list, tuple)):
            total += tensor_bytes(t)
        elif isinstance(t, dict):
            total += tensor_bytes(t.values())
    return total


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimizer's state."""
    return tensor_bytes(optimizer.state.values())


def kind_of(optimizer: CTROptimizer) -> str:
    """Return the periodic work of the next step, for example ``factors+basis``, or ``plain``."""
    step, s = optimizer.steps, optimizer._settings
    kinds = {
        "factors": due(step, s.factor_interval),
        "basis": due(step, s.basis_interval),
        "calibration": calibration_due(step, s.calibration_interval),
    }
    return "+".join(name for name, comes in kinds.items() if comes) or "plain"


def spread(values: list[float]) -> dict[str, float]:
    """Return median, mean, range and count."""
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def table(rows: list[tuple[Any, ...]], head: tuple[str, ...]) -> None:
    """Print a table in columns."""
    cells = [head, *[tuple(_short(v) for v in row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)
