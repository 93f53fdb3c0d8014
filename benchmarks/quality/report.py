"""Markdown tables of result lines.

    python -m benchmarks.quality.report benchmarks/results/quality-*.jsonl > benchmarks/results/quality.md

A table shows the runs of the plan with its name; with ``--all``, tables show every run. Values are means and standard
deviations over seeds. Differences from CTROptimizer at its defaults are paired by seed, with 95 % intervals (Student's
t). Other methods appear at the rates of their runs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.quality import plans
from benchmarks.quality.plans import TUNING_SEED, Spec, complete

Record = dict[str, Any]
Rows = dict[str, dict[int, Record]]  # label, seed

TITLES = {
    "final": "Every figure of one task",
    "task_table": "Other tasks",
    "peers": "Every peer",
    "pareto": "Quality against parameters",
    "ablation": "What each part gives, and how strong it should be",
    "variants": "Options that were tried (validation data)",
}


def label(spec: Spec) -> str:
    """Return a method's name with its rate and options."""
    options = ", ".join(f"{k}={json.dumps(v)}" for k, v in spec["options"].items())
    rate = "" if spec["lr"] is None else f" {spec['lr']:.3g}"
    name = "CTROptimizer" if spec["method"] == "ctr" else "base" if spec["steps"] == 0 else spec["method"]
    return name + ("" if name == "base" else rate) + (f" ({options})" if options else "")


def shape(spec: Spec) -> str:
    """Return the identity of a run, without the learning rate of other methods, which tuning chooses."""
    spec = complete(spec)
    return plans.key_of({**spec, "lr": None} if spec["method"] != "ctr" else spec)


def setting(spec: Spec) -> tuple:
    """Return the values that the runs of one table share."""
    return tuple(spec[k] for k in ("base", "task", "rank", "steps" if spec["steps"] else "seed", "batch", "split"))


def select(records: Iterable[Record], plan: Iterable[Spec]) -> list[Record]:
    """Return the records of a plan's runs with complete specs, without failed runs."""
    wanted = {shape(spec) for spec in plan}
    kept = [{**r, "spec": complete(r["spec"])} for r in records if "loss" in r]
    return [r for r in kept if shape(r["spec"]) in wanted]


def interval(differences: list[float]) -> tuple[float, float]:
    """Return the mean of two or more paired differences and half of its 95 % interval (Student's t)."""
    from scipy import stats

    n = len(differences)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return statistics.mean(differences), half


def steps_to(curve: list[list[float]], target: float) -> float | None:
    """Return the steps until the loss first reaches ``target``, interpolated linearly, or None if it never does."""
    before: list[float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = [step, loss]
    return None


def _mean(values: Iterable[float | None], digits: int = 3) -> str:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return f"{statistics.mean(known):.{digits}f}" if known else ""


def _columns(rows: Rows, reference: dict[int, Record]) -> dict[str, Callable[[dict[int, Record]], str]]:
    """Return the columns besides the loss that at least one row can fill."""
    adamw = next((r for name, r in rows.items() if name.startswith("adamw")), {})

    def reached(runs: dict[int, Record]) -> str:
        return _mean([steps_to(r["curve"], adamw[s]["loss"]) for s, r in runs.items() if s in adamw], 0)

    def extra(part: str, key: str, factor: float, digits: int) -> Callable[[dict[int, Record]], str]:
        return lambda runs: _mean([factor * r[part][key] for r in runs.values() if key in r.get(part, {})], digits)

    columns: dict[str, Callable[[dict[int, Record]], str]] = {}
    every = [r for runs in rows.values() for r in runs.values()]
    if adamw and any(r["curve"] for r in every):
        columns["steps to AdamW's loss"] = reached
    scores = {"accuracy": 100.0, "bleu": 1.0, "chrf": 1.0, "exact_match": 100.0}
    for key, factor in scores.items():
        if any(key in r.get("score", {}) for r in every):
            columns[key + (" %" if factor == 100 else "")] = extra("score", key, factor, 1)
    if any("kl_from_base" in r.get("score", {}) for r in every):
        columns["KL from base"] = extra("score", "kl_from_base", 1.0, 2)
    for task in sorted({t for r in every for t in r.get("also", {})}):
        columns[f"loss on {task}"] = extra("also", task, 1.0, 3)
    for task in sorted({t for r in every for t in r.get("also_accuracy", {})}):
        columns[f"accuracy % on {task}"] = extra("also_accuracy", task, 100.0, 1)
    return columns


def table(rows: Rows) -> list[str]:
    """Return the runs of one setting as Markdown, best first."""
    reference = rows.get("CTROptimizer", {})
    columns = _columns(rows, reference)
    head = ["method", "loss", "sd", "seeds", "from CTROptimizer", *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, runs in sorted(rows.items(), key=lambda row: _sort(row[1])):
        losses = [r["loss"] for r in runs.values()]
        pairs = [runs[s]["loss"] - reference[s]["loss"] for s in runs if s in reference and runs is not reference]
        if len(pairs) > 1 and all(map(math.isfinite, pairs)):
            mean, half = interval(pairs)
            difference = f"{mean:+.4f} ± {half:.4f}"
        else:
            difference = f"{pairs[0]:+.4f}" if pairs else ""
        sd = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        cells = [name, _mean(losses, 4) or "diverged", sd, str(len(losses)), difference]
        lines.append("| " + " | ".join([*cells, *(column(runs) for column in columns.values())]) + " |")
    return lines


def _sort(runs: dict[int, Record]) -> float:
    losses = [r["loss"] for r in runs.values()]
    return statistics.mean(losses) if all(map(math.isfinite, losses)) else math.inf


def group(records: Iterable[Record]) -> dict[tuple, Rows]:
    """Return the records by setting, then label, then seed."""
    tables: dict[tuple, Rows] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        spec = record["spec"]
        tables[setting(spec)][label(spec)][spec["seed"]] = record
    return tables


def robustness(records: list[Record]) -> dict[str, dict[float, float]]:
    """Return the validation loss on E2E with the tuning seed, by method and rate; failed runs count as infinite."""
    losses: dict[str, dict[float, float]] = defaultdict(dict)
    wanted = {plans.key_of(s) for s in plans.robustness(plans.Lines([]))}
    for record in records:
        spec = complete(record["spec"])
        if plans.key_of(spec) in wanted:
            loss = record.get("loss", math.inf)
            losses[spec["method"]][spec["lr"]] = loss if math.isfinite(loss) else math.inf
    return losses


def robustness_table(losses: dict[str, dict[float, float]]) -> list[str]:
    """Return a table of each method's best loss, its loss at the package's rate, and its losses at seven rates."""
    lines = [
        "| method | best rate | best loss | at its package's rate | losses, 1/8 to 8 times the middle |",
        "|---|---|---|---|---|",
    ]
    for method, by_rate in sorted(losses.items(), key=lambda row: min(row[1].values())):
        best = min(by_rate, key=by_rate.__getitem__)
        default = plans.package_rate(method)
        known = by_rate.get(default)
        wide = [by_rate.get(rate) for rate in plans.wide_grid(method)]
        cells = ["" if v is None else f"{v:.3f}" if v < 10 else "-" for v in wide]
        own = "" if known is None else f"{known:.3f} ({default:g})"
        lines.append(f"| {method} | {best:.3g} | {by_rate[best]:.4f} | {own} | {', '.join(cells)} |")
    return lines


def timing_table(records: list[Record]) -> list[str]:
    """Return a table of time per step and peak memory of runs alone on the device, relative to AdamW."""
    runs = {r["spec"]["method"]: r for r in records}
    lines = ["| method | ms a step | against AdamW | setup, s | peak memory, MiB |", "|---|---|---|---|---|"]
    for method, record in sorted(runs.items(), key=lambda row: row[1]["seconds"]):
        step = 1000 * record["seconds"] / record["spec"]["steps"]
        ratio = f"{record['seconds'] / runs['adamw']['seconds']:.2f}" if "adamw" in runs else ""
        peak = record["peak_bytes"] / 2**20
        lines.append(f"| {method} | {step:.1f} | {ratio} | {record['setup_seconds']:.2f} | {peak:.0f} |")
    return lines


def _against(rows: Rows, name: str) -> str:
    """Return CTROptimizer's loss minus a row's, in per cent of the row's loss, with the paired interval."""
    ours, theirs = rows["CTROptimizer"], rows[name]
    pairs = [ours[s]["loss"] - theirs[s]["loss"] for s in theirs if s in ours]
    base = statistics.mean(r["loss"] for r in theirs.values()) / 100
    if len(pairs) < 2:
        return f"{pairs[0] / base:+.1f} %" if pairs else "no common seed"
    mean, half = interval(pairs)
    return f"{mean / base:+.1f} ± {half / base:.1f} %"


def targets(records: list[Record], lines: plans.Lines) -> list[str]:
    """Return a table of CTROptimizer at its defaults against AdamW and the best peer, one line per task."""
    head = ["task", "best peer", "CTROptimizer's loss from it", "from AdamW's", "steps to AdamW's loss"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    chosen = select(records, [*plans.final(lines), *plans.task_table(lines)])
    for key, rows in sorted(group(chosen).items(), key=lambda item: str(item[0])):
        others = {name: runs for name, runs in rows.items() if name not in ("CTROptimizer", "base")}
        adamw = next((name for name in others if name.startswith("adamw")), None)
        if "CTROptimizer" not in rows or not others:
            continue
        best = min(others, key=lambda name: _sort(others[name]))
        steps = [
            found / key[3]
            for seed, run in rows["CTROptimizer"].items()
            if adamw and seed in rows[adamw] and (found := steps_to(run["curve"], rows[adamw][seed]["loss"]))
        ]
        share = f"{100 * statistics.mean(steps):.0f} % of {key[3]}" if steps else ""
        versus = _against(rows, adamw) if adamw else ""
        out.append(f"| {key[1]}, {key[0]} | {best} | {_against(rows, best)} | {versus} | {share} |")
    ours = robustness(records).get("ctr", {})
    if len(ours) > 1:
        spread = 100 * (max(ours.values()) / min(ours.values()) - 1)
        fold = max(ours) / min(ours)
        out += ["", f"Over a {fold:.0f}-fold range of learning rates its worst loss is {spread:.2f} % above its best."]
    return out


def failures(records: Iterable[Record]) -> list[str]:
    """Return the failed runs, one line per method and error."""
    seen = {(r["spec"]["method"], r["error"]) for r in records if "error" in r}
    return [f"- {method}: {error}" for method, error in sorted(seen)]


def _tables(records: Iterable[Record]) -> list[str]:
    """Return a heading and a table for each setting."""
    out = []
    for key, rows in sorted(group(records).items(), key=lambda item: str(item[0])):
        base, task, rank, steps, batch, split = key
        out += ["", f"### {task}, {base}, rank {rank}, {steps} steps of {batch}, {split} split", "", *table(rows)]
    return out


def report_all(records: Iterable[Record]) -> str:
    """Return tables of every run except tuning runs."""
    done = [{"curve": [], **r, "spec": complete(r["spec"])} for r in records if "loss" in r]
    return "\n".join([*_tables(r for r in done if r["spec"]["seed"] < TUNING_SEED), ""])


def report(records: list[Record]) -> str:
    """Return the tables of every plan that has records."""
    lines = plans.Lines(records)
    out: list[str] = ["# Quality: every table", "", "Written by `python -m benchmarks.quality.report`. Losses in nats."]
    summary = targets(records, lines)
    out += ["", "## In short", "", *summary] if len(summary) > 2 else []
    for name, title in TITLES.items():
        chosen = select(records, plans.PLANS[name](lines))
        if chosen:
            out += ["", f"## {title} (`{name}`)"]
        out += _tables(chosen)
    losses = robustness(records)
    if losses:
        note = f"E2E, base30m, rank 8, 150 steps of 32, validation loss, seed {TUNING_SEED}."
        out += ["", "## Learning rates (`tune`, `robustness`)", "", note, "", *robustness_table(losses)]
    solo = select(records, plans.timing(lines))
    if solo:
        out += ["", "## Time and memory (`timing`)", "", "base30m, batch 32, alone on the device.", ""]
        out += timing_table(solo)
    failed = failures(records)
    return "\n".join([*out, *(["", "## Failed runs", "", *failed] if failed else []), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+", help="results files")
    parser.add_argument("--all", action="store_true", help="show every setting, also those of no plan")
    args = parser.parse_args()
    print((report_all if args.all else report)(plans.read(args.lines)), end="")


if __name__ == "__main__":
    main()
