"""One run: train an adapter by its specification, measure it, and return the record for the results file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.quality import generation, tasks
from benchmarks.real import data, measure, methods
from benchmarks.real.specs import Spec, complete, tasks_of

CHECKS = 20  # evaluations of early stopping in one run
WARMUP = 0.1


def schedule(name: str, steps: int) -> Callable[[int], float] | None:
    """Return the function from step to learning-rate factor, or None for a constant rate without a scheduler."""
    warm = max(1, round(WARMUP * steps))
    if name == "cosine":
        return lambda t: 0.5 * (1 + math.cos(math.pi * min(t, steps) / max(1, steps)))
    if name == "linear":
        return lambda t: (t + 1) / warm if t < warm else max(0.0, (steps - t) / max(1, steps - warm))
    return None


class EarlyStopping:
    """Keeps the trainable weights of the lowest loss on held-out rows, for methods without ``holdout``."""

    def __init__(self, model: nn.Module, rows: list[tasks.Example], steps: int, device: torch.device) -> None:
        self.model, self.rows, self.device = model, rows, device
        self.interval = max(1, steps // CHECKS)
        self.best, self.at = math.inf, 0
        self.weights: list[torch.Tensor] = []

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def look(self, done: int) -> None:
        if done % self.interval == 0:
            loss = measure.loss_per_token(self.model, self.rows, self.device)
            if loss < self.best:
                self.best, self.at = loss, done
                self.weights = [p.detach().clone() for p in self._trainable()]

    def restore(self) -> None:
        with torch.no_grad():
            for parameter, kept in zip(self._trainable(), self.weights, strict=True):
                parameter.copy_(kept)


class Trial:
    """Data, base and device of one run."""

    def __init__(self, spec: Spec, base: Any, store: data.Store, device: torch.device) -> None:
        self.spec, self.base, self.store, self.device = complete(spec), base, store, device
        self.splits = {task: store.split(self.spec, task) for task in tasks_of(self.spec)}

    def test(self, task: str) -> list[tasks.Example]:
        return self.store.test(self.spec, task)

    def holdout(self) -> list[tasks.Example]:
        """Return the first ``holdout`` validation rows of the (first) task."""
        held = self.splits[tasks_of(self.spec)[0]][1]
        if len(held) < self.spec["holdout"]:
            raise ValueError(f"holdout: got {self.spec['holdout']}, expected at most the {len(held)} rows held out")
        return held[: self.spec["holdout"]]

    def context(self) -> methods.Context:
        spec, size = self.spec, self.spec["batch"]
        train = self.splits[tasks_of(spec)[0]][0]
        retained = None
        if isinstance(spec["retain"], dict):
            retained = data.pieces(self.store.text(spec["retain"]), self.device)
        rows = self.holdout()
        holdout = [tasks.collate(rows[i : i + size], self.device) for i in range(0, len(rows), size)]
        # Another seed than the training's, so that setup does not see the first training batches.
        return methods.Context(tasks.batches(train, size, 64, spec["seed"] + 7, self.device), retained, holdout)

    def figures(self, model: Any, task: str) -> dict[str, Any]:
        """Return the loss on the task's test rows and on plain text."""
        spec = self.spec
        found = {"loss": measure.loss_per_token(model, self.test(task), self.device)}
        if spec["text"]:
            found["text"] = measure.loss_per_token(model, self.store.text(spec["text"]), self.device)
        return found

    def domains(self, model: Any) -> dict[str, float]:
        own = tasks_of(self.spec)
        return {
            task: measure.loss_per_token(model, self.test(task), self.device)
            for task in self.spec["domains"]
            if task not in own
        }

    def score(self, model: Any, task: str) -> dict[str, float]:
        """Return the scores that the spec's ``score`` names."""
        spec, device, tokenizer = self.spec, self.device, self.store.tokenizer
        scores: dict[str, float] = {}
        for name in spec["score"]:
            kind, _, other = name.partition(":")
            held = self.test(other or task)
            rows = [e.row for e in held]
            if kind == "accuracy":
                if "choices" in rows[0]:
                    found = measure.accuracy(model, rows, tokenizer, device)
                    scores |= {f"{key}:{other}" if other else key: value for key, value in found.items()}
            elif kind == "kl_from_base":
                scores["kl_from_base"] = measure.kl_per_token(self.base, model, held, device)
                if spec["text"]:
                    text = self.store.text(spec["text"])
                    scores["kl_from_base_text"] = measure.kl_per_token(self.base, model, text, device)
            elif kind == "exact_match":
                texts = generation.generate(model, tokenizer, [r["prompt"] for r in rows], 200, size=64)
                scores["exact_match"] = generation.exact_match(texts, [r["target"] for r in rows])
            elif kind == "overlap":
                references = generation.group_references(rows, 200)
                texts = generation.generate(model, tokenizer, list(references), 80, size=64)
                scores |= generation.overlap(texts, list(references.values()))
            else:
                raise ValueError(
                    f"score: got {name!r}, expected accuracy, accuracy:TASK, kl_from_base, exact_match or overlap"
                )
        return scores


def _phase(trial: Trial, run: methods.Run, loss_of: methods.Loss, task: str, number: int) -> dict[str, Any]:
    """Train on one task; return its losses, curve and seconds (without evaluations)."""
    spec, device, model, optimizer = trial.spec, trial.device, run.model, run.optimizer
    steps = spec["steps"]
    factor = schedule(spec["schedule"], steps)
    for group in optimizer.param_groups:  # A second task starts at the full rate.
        group["lr"] = group.get("initial_lr", group["lr"])
    scheduler = None if factor is None else torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    stream = tasks.batches(trial.splits[task][0], spec["batch"], steps, spec["seed"] + 97 * number, device)
    stopping = None
    if spec["holdout"] and spec["method"] != "ctr":
        stopping = EarlyStopping(model, trial.holdout(), steps, device)
    losses, curve, start, paused = [], [], time.time(), 0.0
    for step, batch in enumerate(stream):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        run.after_step(step)
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.detach())
        pause = time.time()
        if spec["curve"] and (step + 1) % spec["curve"] == 0:
            curve.append([step + 1, *trial.figures(model, task).values()])
        if stopping is not None:
            stopping.look(step + 1)
        paused += time.time() - pause
    result = {"train_loss": float(torch.stack(losses[-20:]).mean()) if losses else math.nan, "curve": curve}
    if spec["holdout"] and spec["method"] == "ctr":
        optimizer.restore_best()
    if stopping is not None and steps:
        stopping.restore()
        result["stopped_at"] = stopping.at
    result["seconds"] = round(time.time() - start - paused, 2)
    return result


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of ``metrics()`` that go into a line: numbers and short texts."""
    return {k: v for k, v in metrics.items() if v is None or isinstance(v, bool | int | float | str)}


def train(
    spec: Spec,
    base: Any,
    store: data.Store,
    device: torch.device,
    look: Callable[[Any], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run a spec and return its record without the spec. ``loss`` is the (last) task's test loss per target token.

    ``look`` receives the trained model; its result is added to the record.
    """
    began = time.time()
    trial = Trial(spec, base, store, device)
    spec = trial.spec
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(spec["seed"])
    context = trial.context()
    run = methods.build(base, spec, context)
    model = run.model.to(device).train()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    setup = time.time() - began
    phases, order = [], tasks_of(spec)
    for number, task in enumerate(order):
        phase = _phase(trial, run, context.loss, task, number)
        if spec["sequence"]:
            text = store.text(spec["text"]) if spec["text"] else None
            phase |= {
                "task": task,
                "losses": {t: measure.loss_per_token(model, trial.test(t), device) for t in order},
                "text": measure.loss_per_token(model, text, device) if text else None,
            }
        phases.append(phase)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    metrics = numbers(run.optimizer.metrics()) if hasattr(run.optimizer, "metrics") and spec["steps"] else {}
    model = run.finish() if run.finish is not None else model
    last, held = order[-1], trial.splits[order[-1]][1]
    record = {
        **{k: v for k, v in phases[-1].items() if k in ("train_loss", "curve", "stopped_at")},
        **trial.figures(model, last),
        "validation": measure.loss_per_token(model, held, device) if held else None,
        "domains": trial.domains(model),
        "score": trial.score(model, last),
        "sequence": phases if spec["sequence"] else None,
        "parameters": parameters,
        "peak_bytes": peak,
        "metrics": metrics,
        "seconds": sum(p["seconds"] for p in phases),
        "setup_seconds": round(setup, 2),
        "total_seconds": round(time.time() - began, 2),
    }
    if look is not None:
        record |= look(model)
    if hasattr(run.optimizer, "close"):
        run.optimizer.close()
    return record
