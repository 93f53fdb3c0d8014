"""Cost of retained text and of a budget: whole steps of fused AdamW and of CTROptimizer's variants on one model.

    python -m benchmarks.performance.retention_cost --shape llama2-7b --out retention_cost.jsonl
    python -m benchmarks.performance.retention_cost --shape tiny --device cpu --length 32 --rounds 1 --tokens 1024

The variants are CTROptimizer, with ``retain``, and with ``retain`` and ``kl_budget``. Lines of kind ``retention`` hold
the seconds for measuring retained text. Lines of kind ``variant`` hold seconds per step by round, the ratio to AdamW's
round, the ratio of medians by kind of step, peak memory and state; see README.md beside this file. Options are those of
``step_cost``. With ``--limit-s`` the program starts no round that would exceed the time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.performance.bench import PERIOD, SHAPES, Bench, Resumable, Round, build, run_round
from benchmarks.performance.common import Report, kind_of, spread, state_bytes, table, tensor_bytes
from benchmarks.performance.step_cost import ratio_by_kind
from ctr_optim import CTROptimizer
from ctr_optim.retention import Retention

PIECE, PIECES = 256, 4  # tokens of a piece of retained text, pieces of a batch
VARIANTS = ("ctr", "retain", "budget", "budget on the batch")


@dataclass
class Variant:
    """An optimizer with its own weights and state, which uses the model for one round at a time."""

    bench: Bench
    start: list[Tensor]
    make: Callable[[], torch.optim.Optimizer] | None = None  # None: CTROptimizer, through ``resumable``
    resumable: Resumable | None = None
    rounds: list[Round] = field(default_factory=list)
    holds: dict[str, Any] = field(default_factory=dict)
    plain: torch.optim.Optimizer | None = None

    @property
    def waiting(self) -> int:
        """Bytes on the device between the variant's rounds."""
        if self.resumable is not None:
            return self.resumable.bytes
        return 0 if self.plain is None else state_bytes(self.plain)

    def round(self, steps: int) -> Round:
        """Train for ``steps`` steps from the variant's own weights and state."""
        with torch.no_grad():
            torch._foreach_copy_(self.bench.params, self.start)
        if self.resumable is None:
            assert self.make is not None
            self.plain = self.plain or self.make()
            found = run_round(self.bench, self.plain, steps)
            self.holds = {"state_bytes": state_bytes(self.plain)}
        else:
            optimizer = self.resumable.open()
            found = run_round(self.bench, optimizer, steps, lambda: kind_of(optimizer))
            self.holds = {"state_bytes": state_bytes(optimizer), "metrics": figures(optimizer)}
            self.resumable.close(optimizer)
            del optimizer
        self.start = [p.detach().to("cpu", copy=True) for p in self.bench.params]
        self.bench.free()
        return found


def figures(optimizer: CTROptimizer) -> dict[str, Any]:
    """Return the metrics of bound, budget and skipped steps."""
    names = ("trust/", "budget/", "retain/", "skipped")
    return {k: v for k, v in optimizer.metrics().items() if k.startswith(names)}


def measured(bench: Bench, text: list[Tensor], repeats: int) -> Retention:
    """Measure the statistics of retained text and report the time of each repeat; the first compiles and allocates."""
    seconds = []
    for _ in range(repeats):
        bench.clock.wait()
        began = time.perf_counter()
        found = Retention.measure(bench.model, text)
        bench.clock.wait()
        seconds.append(time.perf_counter() - began)
    held = tensor_bytes(vars(s) for s in found.statistics.values())
    tokens = sum(part.numel() for part in text)
    bench.report.add("retention", tokens=tokens, seconds=seconds, bytes=held, statistics=len(found.statistics))
    bench.free()
    return found


def variants(bench: Bench, chosen: list[str], tokens: int, budget: float, repeats: int) -> dict[str, Variant]:
    """Return AdamW and the chosen variants by name."""
    start = [p.detach().to("cpu", copy=True) for p in bench.params]
    pieces = torch.randint(0, bench.vocabulary, (max(1, tokens // PIECE), PIECE), device=bench.device)
    text = list(pieces.split(PIECES))
    retention = measured(bench, text, repeats)
    options: dict[str, dict[str, Any]] = {
        "ctr": {},
        "retain": {"retain": retention},
        "budget": {"retain": text, "kl_budget": budget},
        "budget on the batch": {"retain": retention, "kl_budget": budget},
    }

    def fused() -> torch.optim.Optimizer:
        return torch.optim.AdamW(bench.params, lr=1e-4, weight_decay=0.0, fused=True)

    found = {"adamw": Variant(bench, start, make=fused)}
    for name in chosen:
        found[name] = Variant(bench, start, resumable=Resumable(bench, **options[name]))
    return found


def interleaved(bench: Bench, every: dict[str, Variant], rounds: int, steps: int, deadline: float) -> None:
    """Run rounds of all variants in turn, every second time in reverse order."""
    report = bench.report
    longest = 0.0
    for index in range(-1, rounds):  # Round -1 warms up: its steps measure more often than later ones.
        names = list(every) if index % 2 == 0 else list(reversed(every))
        began = time.perf_counter()
        if index > 0 and report.elapsed + longest > deadline:
            report.say(f"round {index}: skipped, the time limit would be exceeded")
            return
        for name in names:
            variant = every[name]
            others = sum(v.waiting for other, v in every.items() if other != name)
            round_ = variant.round(3 if index < 0 and name == "adamw" else steps)
            round_.peak = max(0, round_.peak - others)
            if index >= 0:
                variant.rounds.append(round_)
        if index >= 0:
            longest = max(longest, time.perf_counter() - began)
            said = ", ".join(f"{name} {1e3 * v.rounds[-1].seconds:.1f}" for name, v in every.items())
            report.say(f"round {index}, ms a step: {said}")
        else:
            report.say("warm")


def add_lines(report: Report, every: dict[str, Variant]) -> None:
    """Write a line for each variant and print the table."""
    adamw = every["adamw"]
    peak = max(r.peak for r in adamw.rounds)
    rows: list[tuple[Any, ...]] = []
    for name, v in every.items():
        ratios = [r.seconds / a.seconds for r, a in zip(v.rounds, adamw.rounds, strict=True)]
        by_kind = 1.0 if v is adamw else ratio_by_kind(adamw.rounds, v.rounds)
        own = max(r.peak for r in v.rounds)
        kinds = {kind for r in v.rounds for kind in r.kinds}
        step_ms = {
            kind: spread([t for r in v.rounds for t, k in zip(r.step_ms, r.kinds, strict=True) if k == kind])
            for kind in sorted(kinds)
        }
        report.add(
            "variant", name=name, seconds=[r.seconds for r in v.rounds], ratios=ratios,
            ratio_median=statistics.median(ratios), ratio_by_kind=by_kind, peak_bytes=own,
            peak_ratio=own / peak if peak else math.nan, step_ms=step_ms, **v.holds,
        )  # fmt: skip
        milliseconds = 1e3 * statistics.median(r.seconds for r in v.rounds)
        rows.append((name, milliseconds, statistics.median(ratios), by_kind, own / 2**30, own / peak if peak else ""))
    table(rows, ("", "ms a step", "ratio", "by kind", "peak, GiB", "ratio"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "base5m"], default="tiny")
    parser.add_argument("--model", help="local model of --shape base5m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("autocast", "mixed", "bfloat16", "float32"), help="as in step_cost")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of retained text")
    parser.add_argument("--budget", type=float, default=1.0, help="kl_budget, nats per token")
    parser.add_argument("--variants", default=",".join(VARIANTS[:3]), help="any of " + ", ".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=PERIOD, help=f"steps per round, a multiple of {PERIOD}")
    parser.add_argument("--repeats", type=int, default=2, help="measurements of retained text")
    parser.add_argument("--limit-s", type=float, default=math.inf)
    parser.add_argument("--out")
    args = parser.parse_args()
    args.precision = args.precision or ("float32" if args.device == "cpu" else "autocast")
    chosen = args.variants.split(",")
    if unknown := set(chosen) - set(VARIANTS):
        parser.error(f"--variants: got {sorted(unknown)}, expected some of {VARIANTS}")
    if args.steps % PERIOD:
        parser.error(f"--steps: got {args.steps}, expected a multiple of {PERIOD}, so that rounds hold equal work")
    torch.manual_seed(0)
    device = torch.device(args.device)
    setting = {
        k: getattr(args, k) for k in ("shape", "precision", "rank", "batch", "length", "checkpointing", "budget")
    }
    report = Report(args.out, device, **setting)
    bench = build(args, report, device)
    every = variants(bench, chosen, args.tokens, args.budget, args.repeats)
    interleaved(bench, every, args.rounds, args.steps, args.limit_s)
    add_lines(report, every)
    report.say("done")


if __name__ == "__main__":
    main()
