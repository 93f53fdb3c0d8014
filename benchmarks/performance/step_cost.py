"""Cost of a training step with CTROptimizer, compared with fused AdamW and with other optimizers, and part by part.

    python -m benchmarks.performance.step_cost --shape llama2-7b --out results.jsonl

See README.md beside this file.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks.performance.bench import PERIOD, SHAPES, Bench, Resumable, Round, build, run_round
from benchmarks.performance.common import Report, kind_of, spread, state_bytes, table, tensor_bytes
from benchmarks.performance.step_alone import step_alone
from ctr_optim import CTROptimizer, RankScheduler

PARTS = ("whole", "step", "ranks")


# -- whole steps, interleaved ------------------------------------------------------------------------------------


def ctr_round(bench: Bench, resumable: Resumable, steps: int) -> tuple[Round, dict[str, Any]]:
    """Run a round of CTROptimizer; return it with the sizes of its state and its metrics."""
    optimizer = resumable.open()
    found = run_round(bench, optimizer, steps, lambda: kind_of(optimizer))
    holds = {
        "state_bytes": state_bytes(optimizer),
        "staging_bytes": tensor_bytes(t for block in optimizer.blocks for t in block.staged),
        "metrics": {k: v for k, v in optimizer.metrics().items() if k.startswith(("trust/", "skipped"))},
    }
    resumable.close(optimizer)
    return found, holds


def whole_steps(bench: Bench, resumable: Resumable, rounds: int, steps: int) -> None:
    """Measure whole training steps of fused AdamW and CTROptimizer, which alternate on one model."""
    report = bench.report
    adamw = torch.optim.AdamW(bench.params, lr=1e-4, weight_decay=0.0, fused=True)
    run_round(bench, adamw, 3)
    ctr_round(bench, resumable, PERIOD)  # The first steps measure more often than later ones.
    bench.free()
    report.say("warm")
    of_adamw: list[Round] = []
    of_ctr: list[Round] = []
    holds: dict[str, Any] = {}
    for index in range(rounds):
        for who in ("adamw", "ctr") if index % 2 == 0 else ("ctr", "adamw"):
            if who == "adamw":
                of_adamw.append(run_round(bench, adamw, steps))
                of_adamw[-1].peak -= resumable.bytes  # CTROptimizer's saved state also lies on the device.
            else:
                found, holds = ctr_round(bench, resumable, steps)
                bench.free()
                found.peak -= state_bytes(adamw)
                of_ctr.append(found)
        ratio = of_ctr[-1].seconds / of_adamw[-1].seconds
        report.say(f"round {index}: {of_adamw[-1].seconds:.4f} s, {of_ctr[-1].seconds:.4f} s, ratio {ratio:.4f}")
    report_whole(report, of_adamw, of_ctr)
    report.add("state", method="AdamW", state_bytes=state_bytes(adamw))
    report.add("state", method="CTR", **holds)
    report_parts(report, of_adamw, of_ctr)


def report_whole(report: Report, of_adamw: list[Round], of_ctr: list[Round]) -> None:
    """Report ratios of time and memory."""
    ratios = [c.seconds / a.seconds for a, c in zip(of_adamw, of_ctr, strict=True)]
    peaks = [max(0, *(r.peak for r in rounds)) for rounds in (of_adamw, of_ctr)]
    report.add(
        "whole",
        adamw_seconds=[r.seconds for r in of_adamw],
        ctr_seconds=[r.seconds for r in of_ctr],
        ratios=ratios,
        ratio_median=statistics.median(ratios),
        ratio_by_kind=ratio_by_kind(of_adamw, of_ctr),
    )
    report.add(
        "peak", adamw_bytes=peaks[0], ctr_bytes=peaks[1], ratio=peaks[1] / peaks[0] if peaks[0] else float("nan")
    )


def ratio_by_kind(of_adamw: list[Round], of_ctr: list[Round]) -> float:
    """Return the ratio of median step times. CTROptimizer's medians are weighted by the frequency of each kind of step.

    Medians make the ratio robust on a shared machine.
    """
    adamw = [a + b for r in of_adamw for a, b in zip(r.model_ms, r.step_ms, strict=True)]
    kinds: dict[str, list[float]] = {}
    for r in of_ctr:
        for kind, a, b in zip(r.kinds, r.model_ms, r.step_ms, strict=True):
            kinds.setdefault(kind, []).append(a + b)
    total = sum(len(times) for times in kinds.values())
    return sum(len(times) * statistics.median(times) for times in kinds.values()) / total / statistics.median(adamw)


def report_parts(report: Report, of_adamw: list[Round], of_ctr: list[Round]) -> None:
    """Report the time of forward with backward, and of the step, by kind of step."""
    report.add(
        "part",
        kind="AdamW",
        model_ms=spread([t for r in of_adamw for t in r.model_ms]),
        step_ms=spread([t for r in of_adamw for t in r.step_ms]),
    )
    for kind in sorted({k for r in of_ctr for k in r.kinds}, key=len):
        model, step = (
            [t for r in of_ctr for t, k in zip(getattr(r, name), r.kinds, strict=True) if k == kind]
            for name in ("model_ms", "step_ms")
        )
        report.add("part", kind=kind, model_ms=spread(model), step_ms=spread(step))


# -- ranks that move ---------------------------------------------------------------------------------------------


def rank_schedule(bench: Bench, resumable: Resumable, steps: int, interval: int, multiple: int | None) -> None:
    """Measure ``steps`` whole steps with a rank schedule, after a first rank event.

    The steps after the first event compile kernels for its ranks, once per machine.
    """
    adamw = torch.optim.AdamW(bench.params, lr=1e-4, weight_decay=0.0, fused=True)
    run_round(bench, adamw, 2)
    reference = run_round(bench, adamw, min(steps, 20))
    waiting = resumable.bytes
    del adamw
    bench.free()
    optimizer = resumable.open(rank_scheduler={"interval": 10, "window": 4, "multiple": multiple})
    first = run_round(bench, optimizer, 10 + min(10, steps))
    plan = dict(interval=interval, window=min(8, interval), multiple=multiple)
    plan |= dict(total_steps=optimizer.steps + steps, until=1.0)
    optimizer.rank_scheduler = RankScheduler(**plan)
    events: list[Any] = []
    optimizer.on_rank_event(events.append)
    found = run_round(bench, optimizer, steps, lambda: rank_kind(optimizer, plan))
    by_kind = {
        kind: {
            name: spread([t for t, k in zip(getattr(found, name), found.kinds, strict=True) if k == kind])
            for name in ("model_ms", "step_ms")
        }
        for kind in sorted(set(found.kinds))
    }
    bench.report.add(
        "ranks",
        seconds=found.seconds,
        adamw_seconds=reference.seconds,
        ratio=found.seconds / reference.seconds,
        peak_bytes=found.peak,
        adamw_peak_bytes=reference.peak - waiting,
        by_kind=by_kind,
        first_step_ms=max(first.step_ms),
        changes=len(events),
        ranks=sorted({pair.rank for pair in optimizer.pairs}),
        plan=plan,
    )
    resumable.close(optimizer)


def rank_kind(optimizer: CTROptimizer, plan: dict[str, Any]) -> str:
    """Return the kind of the next step: ``event``, ``sketched`` or ``between``."""
    step = optimizer.steps
    left = -(step + 1) % plan["interval"]
    if left == 0:
        return "event"
    return "sketched" if left < plan["window"] else "between"


# -- the program -------------------------------------------------------------------------------------------------


def summary(report: Report) -> None:
    """Print the table of all results."""
    gib = 2**30
    rows: list[tuple[Any, ...]] = []
    for line in report.lines:
        if line["what"] == "whole":
            adamw, ctr = (statistics.median(line[k]) * 1e3 for k in ("adamw_seconds", "ctr_seconds"))
            rows.append(("whole step, ms: AdamW, CTR, ratio", adamw, ctr, line["ratio_median"]))
            rows.append(("whole step: ratio of medians by kind of step", "", "", line["ratio_by_kind"]))
        elif line["what"] == "peak":
            rows.append(
                ("peak, GiB: AdamW, CTR, ratio", line["adamw_bytes"] / gib, line["ctr_bytes"] / gib, line["ratio"])
            )
        elif line["what"] == "part":
            rows.append((f"{line['kind']}: model, step, ms", line["model_ms"]["median"], line["step_ms"]["median"], ""))
        elif line["what"] == "step" and "ms" in line:
            mib = line["state_bytes"] / 2**20
            rows.append((f"step() {line['method']}: mean, median, MiB", line["ms"]["mean"], line["ms"]["median"], mib))
        elif line["what"] == "step":
            rows.append((f"step() {line['method']}", line["error"][:60], "", ""))
        elif line["what"] == "ranks":
            ctr, adamw = 1e3 * line["seconds"], 1e3 * line["adamw_seconds"]
            rows.append(("rank schedule, ms: AdamW, CTR, ratio", adamw, ctr, line["ratio"]))
    table(rows, ("", "", "", ""))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "base5m"], default="tiny")
    parser.add_argument("--model", help="local model of --shape base5m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision",
        choices=("autocast", "mixed", "bfloat16", "float32"),
        help="autocast: bf16 base, float32 adapters, bf16 autocast (as in trainers; default on cuda); mixed: the same "
        "without autocast; bfloat16: adapters in bf16, too; float32: all in float32 (default on cpu)",
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=PERIOD, help=f"steps per round, a multiple of {PERIOD}")
    parser.add_argument("--parts", default=",".join(PARTS), help="any of " + ", ".join(PARTS))
    parser.add_argument("--rank-steps", type=int, default=200)
    parser.add_argument("--rank-interval", type=int, default=100)
    parser.add_argument("--rank-multiple", type=int, help="divisor of all ranks; default: the scheduler's")
    parser.add_argument("--peer-seconds", type=float, default=5.0, help="time limit for another optimizer's steps")
    parser.add_argument("--wide-soap", action="store_true", help="also time SOAP at its defaults, on one block")
    parser.add_argument("--out")
    args = parser.parse_args()
    args.precision = args.precision or ("float32" if args.device == "cpu" else "autocast")
    if args.steps % PERIOD:
        parser.error(f"--steps: got {args.steps}, expected a multiple of {PERIOD}, so that rounds hold equal work")
    return args


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    torch.manual_seed(0)
    setting = {k: getattr(args, k) for k in ("shape", "precision", "rank", "batch", "length", "checkpointing")}
    report = Report(args.out, device, **setting)
    bench = build(args, report, device)
    resumable, parts = Resumable(bench), args.parts.split(",")
    if "whole" in parts:
        whole_steps(bench, resumable, args.rounds, args.steps)
    if "step" in parts:
        step_alone(bench, resumable, args.peer_seconds, args.wide_soap)
    if "ranks" in parts:
        bench.free()
        rank_schedule(bench, resumable, args.rank_steps, args.rank_interval, args.rank_multiple)
    report.say("done")
    summary(report)


if __name__ == "__main__":
    main()
