"""Thousands of steps with rank events, with a check of every promise.

    python -m benchmarks.trust.long_run --steps 20000 --out benchmarks/results/trust-cpu.jsonl

The model is tiny (two blocks of width 16, six LoRA layers) and runs in float32. Checks:

- every step: the predicted KL stays within its bound, the parameters within the budget;
- every rank event: growth keeps the function, a cut keeps the directions of most energy, transported bases are
  orthonormal;
- every update of the factors: they equal moving averages in float64 from independent hooks. The averages of H and D
  start again at a rank event, which changes their space;
- every 97 steps: the predicted KL equals the KL computed from the weights before and after the step;
- every ``--every`` steps: number of objects, tensors and hooks, resident memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ctr_optim
from ctr_optim import CTROptimizer
from ctr_optim.ranks import allocation

VOCAB, WIDTH = 24, 16
COMMAND = "python -m benchmarks.trust.long_run"
MAX_KL = 5e-3  # small enough to shorten many of the steps


class LoRALinear(nn.Module):
    """``y = W0 x + 2 B A x``."""

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)
        self.scaling = 2.0
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.lora_B(self.lora_A(x))


class Block(nn.Module):
    """Mixes each token with the mean of the tokens up to it, then applies an MLP."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.mix = LoRALinear(2 * WIDTH, WIDTH, rank)
        self.up, self.down = LoRALinear(WIDTH, 2 * WIDTH, rank), LoRALinear(2 * WIDTH, WIDTH, rank)

    def forward(self, x: Tensor) -> Tensor:
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device).view(1, -1, 1)
        x = x + self.mix(torch.cat([x, before], -1)).tanh()
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    """Two blocks between a frozen embedding and a frozen head."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH).requires_grad_(False)
        self.blocks = nn.Sequential(Block(rank), Block(rank))
        self.head = nn.Linear(WIDTH, VOCAB).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids)))


def batch(step: int, rule: Tensor) -> Tensor:
    """Return sequences of a random grammar. It changes every 2,000 steps, so that the model can always learn."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (8, 17), generator=generator)
    for t in range(2, 17):
        follow = rule[step // 2000 % len(rule)][ids[:, t - 1], ids[:, t - 2]]
        ids[:, t] = torch.where(torch.rand(8, generator=generator) < 0.8, follow, ids[:, t])
    return ids


@dataclass
class Worst:
    """The largest value so far of every quantity that must stay small."""

    seen: dict[str, float] = field(default_factory=dict)

    def note(self, name: str, value: float | Tensor) -> None:
        """Update the largest value of ``name``; NaN counts as infinite."""
        number = float(value)
        self.seen[name] = max(self.seen.get(name, 0.0), number if number == number else float("inf"))


class Oracle:
    """The factors' moving averages in float64, from hooks that are independent of the optimizer.

    Squared gradients are averaged relative to ``s^2``, the loss's scale at the logits, and multiplied by its average.
    """

    def __init__(self, opt: CTROptimizer, decay: float, model: nn.Module) -> None:
        self.opt, self.decay, self.updates = opt, decay, 0
        self.scale = self.average_scale = 0.0  # s^2 of the last backward, and its average
        self.now: dict[str, dict[str, Tensor]] = {}
        self.mean: dict[str, dict[str, Tensor]] = {}
        for pair in opt.pairs:
            pair.down.register_forward_hook(lambda _m, args, _o, n=pair.name: self._entered(n, args[0]))
            pair.up.register_forward_hook(lambda m, args, out, n=pair.name: self._left(n, m, args[0], out))
        model.register_forward_hook(lambda _m, _args, logits: self._scaled(logits))

    def _scaled(self, logits: Tensor) -> None:
        def seen(grad: Tensor) -> None:
            tokens = (grad != 0).any(-1).sum()
            self.scale = float(tokens * grad.double().square().sum())

        if logits.requires_grad:
            logits.register_hook(seen)  # type: ignore[no-untyped-call]

    def _entered(self, name: str, x: Tensor) -> None:
        if torch.is_grad_enabled():
            self.now[name] = {"x": x.detach().double().flatten(0, -2)}

    def _left(self, name: str, module: nn.Module, h: Tensor, out: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        seen = self.now[name]
        seen["h"], seen["B"] = h.detach().double().flatten(0, -2), module.weight.detach().double()  # type: ignore
        out.register_hook(lambda g: seen.__setitem__("g", g.double().flatten(0, -2)))  # type: ignore[no-untyped-call]

    def update(self) -> float:
        """Add the last backward to the averages; return the smallest share of active tokens of any layer.

        A token is active at a layer if its gradient there is nonzero; a ReLU after the layer may zero it. The loss is
        treated as a mean over the active tokens of the layer with the fewest.
        """
        self.updates += 1
        weight = (1 - self.decay) / (1 - self.decay**self.updates)
        self.average_scale += weight * (self.scale - self.average_scale)
        active = {name: (t["g"] != 0).any(-1) for name, t in self.now.items()}
        tokens = min(int(a.sum()) for a in active.values())
        for name, t in self.now.items():
            x, h = t["x"][active[name]], t["h"][active[name]]
            g = t["g"] * tokens  # gradients of the sum over tokens
            d = g @ t["B"]
            new = {
                "input_diagonal": x.square().mean(0),
                "output_diagonal": g.square().sum(0) / tokens / self.scale,
                "rank_input": h.mT @ h / len(h),
                "rank_output": d.mT @ d / tokens / self.scale,
            }
            kept = self.mean.setdefault(name, {k: torch.zeros_like(v) for k, v in new.items()})
            for key, value in new.items():
                kept[key] = torch.lerp(kept[key], value, weight)
        return tokens / len(next(iter(active.values())))

    def adopt(self) -> None:
        """Copy H and D from the optimizer after a rank event, which changes their space."""
        for pair in self.opt.pairs:
            for key in ("rank_input", "rank_output"):
                if pair.name in self.mean:
                    self.mean[pair.name][key] = self.opt.state[pair.B][key].double() / self._units(key)

    def _units(self, key: str) -> float:
        """Return the factor of an average: the loss's average scale for squared gradients, else 1."""
        return self.average_scale if "output" in key else 1.0

    def compare(self, worst: Worst) -> None:
        """Record the relative difference of every factor."""
        for pair in self.opt.pairs:
            for key, relative in self.mean[pair.name].items():
                mine = relative * self._units(key)
                error = (self.opt.state[pair.B][key].double() - mine).norm() / mine.norm().clamp_min(1e-300)
                worst.note(f"factor drift, {key}", error)


def predicted_again(opt: CTROptimizer, before: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Return ``kappa q / 2`` of the change of the weights, in dense float64 algebra."""
    total = 0.0
    for pair in opt.pairs:
        s = opt.state[pair.B]
        H, D, C, S = (s[k].double() for k in ("rank_input", "rank_output", "input_diagonal", "output_diagonal"))
        a, b = (t.double() for t in before[pair.name])
        da, db = pair.A.detach().double() - a, pair.B.detach().double() - b
        one, two = float((da.mT @ D @ da).diagonal() @ C), float((db @ H @ db.mT).diagonal() @ S)
        cross = float(((S[:, None] * (b @ da) * C) @ a.mT * db).sum())
        limit = (max(one, 0) * max(two, 0)) ** 0.5
        total += one + two + 2 * min(max(cross, -limit), limit)
    return 0.5 * total * float(opt.metrics()["trust/coupling"])


def orthonormality(opt: CTROptimizer) -> float:
    """Return the largest absolute entry of ``Q^T Q - I`` over all bases."""
    worst = 0.0
    for pair in opt.pairs:
        for p in (pair.A, pair.B):
            basis = opt.state[p]["basis"].double()
            worst = max(worst, float((basis.mT @ basis - torch.eye(len(basis), dtype=basis.dtype)).abs().max()))
    return worst


def live(besides: int) -> dict[str, int]:
    """Return the number of objects (minus ``besides``), tensors and their bytes, and the resident memory."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]  # Subclasses may have no storage.
    storage = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    statm = Path("/proc/self/statm")
    page = resource.getpagesize()
    resident = int(statm.read_text().split()[1]) * page if statm.exists() else 0
    return {
        "objects": len(gc.get_objects()) - besides,
        "tensors": len(tensors),
        "tensor_bytes": sum(storage.values()),
        "resident_mb": round(resident / 2**20),
    }


def hooks(model: nn.Module) -> int:
    """Return the number of hooks on all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_load_state_dict_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def watching(resize: Callable[..., None], worst: Worst) -> Callable[..., None]:
    """Return ``allocation.resize`` with checks of a layer's function.

    Growth must not change the function. A cut must keep exactly the best directions. The adapter's energy in the Fisher
    metric is ``tr(D H)``; after the cut it must equal the sum of the largest eigenvalues of ``D H``.
    """

    def watched(some: Any, kept: int, added: int, state: Callable[[Tensor], Any], *rest: Any, **more: Any) -> None:
        before = [(s.pair.rank, (s.pair.B @ s.pair.A).detach().double(), energies(state(s.pair.B))) for s in some]
        resize(some, kept, added, state, *rest, **more)
        for s, (rank, old, energy) in zip(some, before, strict=True):
            best = energy.sort(descending=True).values[:kept].sum()
            factors = state(s.pair.B)
            left = (factors["rank_output"].double() * factors["rank_input"].double().mT).sum()
            error = (left - best).abs() / energy.sum().clamp_min(1e-300)
            worst.note("energy of the kept directions, relative error", error)
            if kept == rank:
                change = ((s.pair.B @ s.pair.A).detach().double() - old).norm()
                worst.note("change of the function by growth", change / old.norm().clamp_min(1e-300))

    def energies(factors: Any) -> Tensor:
        return torch.linalg.eigvals(factors["rank_output"].double() @ factors["rank_input"].double()).real

    return watched


def run(steps: int, every: int = 1000, interval: int = 50, seed: int = 0) -> dict[str, Any]:
    """Train with all checks and return their results.

    Args:
        steps: steps of the optimizer.
        every: steps between two measurements of memory.
        interval: steps between rank events.
        seed: seed of the model and the data.
    """
    torch.manual_seed(seed)
    rule = torch.randint(0, VOCAB, (8, VOCAB, VOCAB))
    model = Model(rank=4)
    ranks = dict(interval=interval, until=1.0, hysteresis=0.0, window=4, min_rank=1, max_rank=10)
    trainable = [p for p in model.parameters() if p.requires_grad]
    opt = CTROptimizer(trainable, max_kl=MAX_KL, weight_decay=0.01, rank_scheduler=ranks)
    oracle, worst, events = Oracle(opt, 0.95, model), Worst(), []
    budget = sum(p.numel() for p in trainable)
    opt.on_rank_event(events.append)
    looks, losses, violations, shortened, fewest, started = [], [], 0, 0, 1.0, time.perf_counter()
    with mock.patch.object(allocation, "resize", watching(allocation.resize, worst)), warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(steps):
            ids = batch(step, rule)
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            commits, told = opt._curvature.taps.enabled, len(events)
            again = step % 97 == 0
            before = {p.name: (p.A.detach().clone(), p.B.detach().clone()) for p in opt.pairs} if again else {}
            opt.step()
            metrics = opt.metrics()
            bound = metrics["trust/max_kl"]
            shortened += metrics["trust/scale"] < 1
            violations += not metrics["trust/predicted_kl"] <= bound * (1 + 1e-4)
            worst.note("predicted KL / bound", metrics["trust/predicted_kl"] / bound)
            if again and len(events) == told:
                worst.note("predicted KL from the weights / bound", predicted_again(opt, before) / bound)
            used = sum(pair.A.numel() + pair.B.numel() for pair in opt.pairs)
            worst.note("parameters / budget", used / budget)
            if commits:
                fewest = min(fewest, oracle.update())
            if len(events) > told:
                worst.note("orthonormality of transported bases", orthonormality(opt))
                oracle.adopt()
            elif commits:
                oracle.compare(worst)
            if again:
                worst.note("orthonormality of bases", orthonormality(opt))
            opt.zero_grad()
            losses.append(float(loss.detach()))
            if (step + 1) % every == 0:
                looks.append({"step": step + 1, **live(besides=len(events)), "hooks": hooks(model)})
    return {
        "steps": opt.steps,
        "seconds": round(time.perf_counter() - started, 1),
        "violations": violations,
        "steps_shortened": shortened,
        "skipped_steps": opt.metrics()["skipped_steps"],
        "failed_decompositions": opt.metrics()["failed_decompositions"],
        "rank_events": len({e.step for e in events}),
        "rank_changes": len(events),
        "reasons": {r: sum(e.reason == r for e in events) for r in ("grow", "shrink", "turn")},
        "ranks": opt.metrics()["ranks"],
        "worst": worst.seen,
        "memory": looks,
        "fewest_tokens_in_a_layer": fewest,
        "loss": [sum(losses[:50]) / 50, sum(losses[-50:]) / 50],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--interval", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = run(options.steps, options.every, options.interval, options.seed)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "ctr_optim": ctr_optim.__version__}
    command = f"{COMMAND} --steps {options.steps}"
    line = {"what": "long run", **found, "seed": options.seed, "versions": versions, "command": command}
    print(json.dumps(line, indent=1))
    if options.out is not None:
        with Path(options.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
