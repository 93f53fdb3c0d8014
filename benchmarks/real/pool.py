"""Work off specs with several processes a device: longest first, nothing begun too late, failures contained.

One process a slot loads the model once and runs what the parent gives it over a pipe. The parent alone writes results,
line by line. A run that is out of memory is tried again with half of the device's slots busy, then alone on the device.
A process that dies is replaced, and its run is tried once more.
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
MARGIN = 1.15  # a run is begun where the time left is this many times the estimate
GUESS = {"cuda": 0.35, "cpu": 2.5}  # seconds for a unit of cost before anything is known, six processes a GPU


@dataclass
class Job:
    """A run to do."""

    spec: Spec
    cost: float
    memory: int = 0  # times that it was out of memory
    deaths: int = 0


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
    """Seconds for a unit of cost: a guess, until ``FEW`` runs are known; then near the slowest of the last ones."""

    guess: float
    seen: list[float] = field(default_factory=list)

    def add(self, seconds: float, cost: float) -> None:
        self.seen.append(seconds / cost)

    @property
    def value(self) -> float:
        if len(self.seen) < FEW:  # one short run says little about long ones
            return max([self.guess, *self.seen])
        ordered = sorted(self.seen[-40:])
        return ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]


class Pool:
    """``entry(device, pipe, *arguments)`` runs in every process: sends ``"ready"``, then answers specs with results.

    ``write(spec, result)`` gets every result in the parent. ``pace`` may hold what earlier runs took. ``price`` is the
    estimated time of a spec, in any unit.
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
        """Run all that can be run in time, the longest first or as they are given; gives how many were not."""
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
                    break  # nothing that fits is left
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
        """The first run in line that ends in time and that the device has memory for."""
        busy = sum(s.device == slot.device and s.job is not None for s in self.slots)
        alone = any(s.device == slot.device and s.job is not None and s.job.memory >= 2 for s in self.slots)
        for job in self.waiting:
            most = self.each >> job.memory if job.memory < 2 else 1  # runs on this device at once
            in_time = time.time() + MARGIN * self.pace.value * job.cost < self.deadline
            if in_time and not alone and busy < max(1, most):
                try:
                    slot.pipe.send(job.spec)
                except OSError:  # it ended while it waited
                    return self._died(slot)
                self.waiting.remove(job)
                slot.job, slot.began = job, time.time()
                return

    def _listen(self, slots: list[Slot]) -> None:
        """Take in answers and deaths; waits for one of them, or for a moment."""
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
            self.waiting.append(job)  # at the end: later
            self.say(f"out of memory on {slot.device}, again later: {job.spec['method']} on {job.spec['task']}")
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
