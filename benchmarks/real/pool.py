"""Run specs in several processes per device, the longest first, with a time limit and isolated failures.

Each slot is one process. It loads the model once and runs the specs that the parent sends over a pipe. Only the parent
writes results, line by line. A run that exhausts the memory is repeated with half of the device's slots busy, then
alone on the device. A process that dies is replaced, and its run is repeated once.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.real.specs import Spec, cost

Result = dict[str, Any]
MEMORY_TRIES, DEATHS = 3, 2
FEW = 3  # runs
MARGIN = 1.15  # A run starts if the time left is at least this many times its estimate.
GUESS = {"cuda": 0.35, "cpu": 2.5}  # seconds per unit of cost before any run finished, six processes per GPU


@dataclass
class Job:
    """A run that waits or is in progress."""

    spec: Spec
    cost: float
    memory: int = 0  # how often it ran out of memory
    deaths: int = 0  # how often its process died


@dataclass(eq=False)
class Slot:
    """A worker process and its current run."""

    device: str
    process: Any
    pipe: Connection
    job: Job | None = None
    began: float = 0.0
    ready: bool = False


@dataclass
class Pace:
    """Seconds per unit of cost: a guess until ``FEW`` runs are done, then the 90 % quantile of the last 40 runs."""

    guess: float
    seen: list[float] = field(default_factory=list)

    def add(self, seconds: float, cost: float) -> None:
        self.seen.append(seconds / cost)

    @property
    def value(self) -> float:
        if len(self.seen) < FEW:  # One short run predicts long runs badly.
            return max([self.guess, *self.seen])
        ordered = sorted(self.seen[-40:])
        return ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]


class Pool:
    """Processes that run specs.

    Args:
        entry: ``entry(device, pipe, *arguments)`` runs in every process. It sends ``"ready"``, then answers each spec
            with a result.
        arguments: further arguments of ``entry``.
        devices: names of the devices.
        each: processes per device.
        write: ``write(spec, result)`` receives every result in the parent.
        deadline: end of the work, seconds since the epoch.
        pace: the pace of earlier runs.
        say: receives progress texts.
        price: estimated time of a spec, in any unit.
    """

    def __init__(
        self,
        entry: Callable[..., None],
        arguments: tuple[Any, ...],
        devices: list[str],
        each: int,
        write: Callable[[Spec, Result], None],
        deadline: float,
        pace: Pace | None = None,
        say: Callable[[str], None] = print,
        price: Callable[[Spec], float] = cost,
    ) -> None:
        self.entry, self.arguments, self.devices, self.each = entry, arguments, devices, each
        self.write, self.deadline, self.say, self.price = write, deadline, say, price
        self.pace = pace or Pace(GUESS[devices[0].partition(":")[0]])
        self.context = multiprocessing.get_context("spawn")
        self.slots: list[Slot] = []
        self.waiting: list[Job] = []
        self.failed_starts = 0

    def _start(self, device: str) -> None:
        here, there = self.context.Pipe()
        process = self.context.Process(target=self.entry, args=(device, there, *self.arguments), daemon=True)
        process.start()
        there.close()
        self.slots.append(Slot(device, process, here))

    def work(self, specs: list[Spec], in_order: bool = False) -> int:
        """Run the specs that fit into the time, the longest first or in the given order; return how many are left."""
        self.waiting = [Job(spec, self.price(spec)) for spec in specs]
        if not in_order:
            self.waiting.sort(key=lambda job: job.cost, reverse=True)
        for index in range(min(self.each * len(self.devices), len(self.waiting))):
            self._start(self.devices[index % len(self.devices)])
        try:
            while time.time() < self.deadline and (any(s.job for s in self.slots) or self.waiting):
                for slot in [s for s in self.slots if s.ready and s.job is None]:
                    self._give(slot)
                alive = [s for s in self.slots if s.job is not None or not s.ready]
                if not alive:
                    break  # No waiting run fits into the time left.
                self._listen(alive)
        finally:
            left = len(self.waiting) + sum(s.job is not None for s in self.slots)
            for slot in self.slots:
                slot.process.terminate()
            for slot in self.slots:
                slot.process.join(10)
                if slot.process.is_alive():
                    slot.process.kill()
        return left

    def _give(self, slot: Slot) -> None:
        """Send the slot the first waiting run that fits into the time and into the device's memory."""
        busy = sum(s.device == slot.device and s.job is not None for s in self.slots)
        alone = any(s.device == slot.device and s.job is not None and s.job.memory >= 2 for s in self.slots)
        for job in self.waiting:
            most = self.each >> job.memory if job.memory < 2 else 1  # runs on this device at once
            in_time = time.time() + MARGIN * self.pace.value * job.cost < self.deadline
            if in_time and not alone and busy < max(1, most):
                try:
                    slot.pipe.send(job.spec)
                except OSError:  # The process ended while it waited.
                    return self._died(slot)
                self.waiting.remove(job)
                slot.job, slot.began = job, time.time()
                return

    def _listen(self, slots: list[Slot]) -> None:
        """Wait up to 5 seconds for answers and deaths of processes, and handle them."""
        by_handle: dict[Any, Slot] = {}
        for slot in slots:
            by_handle[slot.pipe] = by_handle[slot.process.sentinel] = slot
        heard = wait(list(by_handle), timeout=max(0.0, min(5.0, self.deadline - time.time())))
        for slot in {by_handle[handle] for handle in heard}:
            try:
                message = slot.pipe.recv() if slot.pipe.poll() else None
            except (EOFError, OSError):
                message = None
            if message is not None:
                self._answer(slot, message)
            elif not slot.process.is_alive():
                self._died(slot)

    def _answer(self, slot: Slot, message: Any) -> None:
        if message == "ready":
            slot.ready, self.failed_starts = True, 0
            return
        job, slot.job = slot.job, None
        assert job is not None
        if message.get("out_of_memory") and job.memory < MEMORY_TRIES - 1:
            job.memory += 1
            self.waiting.append(job)  # The run goes to the end of the queue.
            self.say(f"out of memory on {slot.device}, repeated later: {job.spec['method']} on {job.spec['task']}")
            return
        if "error" not in message:
            self.pace.add(time.time() - slot.began, job.cost)
        self.write(job.spec, message)

    def _died(self, slot: Slot) -> None:
        self.slots.remove(slot)
        code = slot.process.exitcode
        self.say(f"a process on {slot.device} ended with exit code {code}")
        if slot.job is not None:
            slot.job.deaths += 1
            if slot.job.deaths < DEATHS:
                self.waiting.append(slot.job)
            else:
                self.write(slot.job.spec, {"error": f"the process died {DEATHS} times, last with exit code {code}"})
        elif not slot.ready:
            self.failed_starts += 1
        if self.failed_starts <= self.each and self.waiting:
            self._start(slot.device)
