"""Tables of the results of ``python -m benchmarks.ranks.compress``."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

Record = dict[str, Any]
CUTS = ("compress", "svd", "svd_uniform", "convert_to_lora", "magnitude")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def heading(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def report(records: list[Record]) -> str:
    """Return all tables: size and cost of cuts, parameters of other methods at equal loss, schedules, failures."""
    good = [r for r in records if "loss" in r]
    failed = sorted({f"- {r['job']['kind']} {r['job']['method']} {r['job']['task']}: {r['error']}"
                     for r in records if "error" in r})  # fmt: skip
    lines = [*cut_table(good), "", *peer_table(good), "", *uncut_table(good), "", *schedule_table(good)]
    return "\n".join(lines + (["", "Failed:", "", *failed] if failed else []))


def cut_table(records: list[Record]) -> list[str]:
    """Return a table of the share of parameters left and the rise of the test loss, by job and tolerance."""
    head = [
        "task",
        "trained by",
        "rank",
        "tolerance",
        "share",
        "held cost / tolerance",
        "test cost / tolerance",
        "loss %",
    ]
    lines = heading(*head, *CUTS)
    cells: dict[Any, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        if r["way"] in CUTS:
            job = r["job"]
            cells[job["task"], job["method"], job["rank"], r["tolerance"]][r["way"]].append(r)
    for (task, method, rank, tolerance), by_way in sorted(cells.items()):
        ours = by_way["compress"]
        held = mean([r["held_cost"] for r in ours]) / tolerance
        cost = mean([max(r["rise"], r["kl"]) for r in ours]) / tolerance
        percent = 100 * mean([r["rise"] / (r["loss"] - r["rise"]) for r in ours])
        rises = [f"{mean([r['rise'] for r in by_way[w]]):+.4f}" if by_way[w] else "" for w in CUTS]
        share = mean([r["share"] for r in ours])
        lines.append(
            f"| {task} | {method} | {rank} | {tolerance:g} | {share:.3f} | {held:.2f} | {cost:.2f} | {percent:+.2f} | "
            + " | ".join(rises) + " |"
        )  # fmt: skip
    return lines


def peer_table(records: list[Record]) -> list[str]:
    """Return, for each of CTROptimizer's adapters that ``compress`` cut, the relative size of other methods.

    The size is the fewest parameters with which a method reaches the cut adapter's test loss, divided by the cut
    adapter's parameters. It is empty if no adapter of the method reaches that loss.
    """
    peers = {
        "adamw + svd": ("adamw", ("svd", "svd_uniform")), "adamw + convert_to_lora": ("adamw", ("convert_to_lora",)),
        "adamw + magnitude": ("adamw", ("magnitude",)), "adamw + compress": ("adamw", ("compress",)),
        "adamw": ("adamw", ("plain", "uncut")), "ctr": ("ctr", ("plain", "uncut", "wide")),
        "adalora": ("adalora", ("adalora",)),
    }  # fmt: skip
    lines = heading("task", "rank", "tolerance", "parameters", "loss", *peers)
    means: dict[Any, list[Record]] = defaultdict(list)
    for r in records:
        job = r["job"]
        means[job["task"], job["method"], r["way"], job["rank"], r.get("tolerance")].append(r)
    points = {k: (mean([r["parameters"] for r in v]), mean([r["loss"] for r in v])) for k, v in means.items()}
    for (task, method, way, rank, tolerance), (size, loss) in sorted(points.items(), key=str):
        if (method, way) == ("ctr", "compress"):
            cells = []
            for peer, ways in peers.values():
                equal = [p for k, (p, at) in points.items() if k[:2] == (task, peer) and k[2] in ways and at <= loss]
                cells.append(f"{min(equal) / size:.2f}" if equal and size else "")
            lines.append(f"| {task} | {rank} | {tolerance:g} | {size:,.0f} | {loss:.4f} | {' | '.join(cells)} |")
    return lines


def uncut_table(records: list[Record]) -> list[str]:
    """Return a table of the uncut adapters."""
    lines = heading("task", "trained by", "rank", "parameters", "test loss", "n")
    plain: dict[Any, list[Record]] = defaultdict(list)
    for r in records:
        if r["way"] not in CUTS and r["way"] != "scheduled":
            plain[r["job"]["task"], r["job"]["method"], r["job"]["rank"]].append(r)
    for (task, method, rank), some in sorted(plain.items()):
        size, loss = mean([r["parameters"] for r in some]), mean([r["loss"] for r in some])
        lines.append(f"| {task} | {method} | {rank} | {size:,.0f} | {loss:.4f} | {len(some)} |")
    return lines


def schedule_table(records: list[Record]) -> list[str]:
    """Return a table that compares training with a tolerance and training at its starting rank."""
    times = ("ms a step", "at full rank", "by quarter")
    lines = heading("task", "tolerance", "parameters left", "loss", "at full rank", "difference %", *times)
    wide: dict[Any, list[Record]] = defaultdict(list)
    moved: dict[Any, list[Record]] = defaultdict(list)
    for r in records:
        job = r["job"]
        if r["way"] == "wide":
            wide[job["task"], job["rank"]].append(r)
        if r["way"] == "scheduled":
            moved[job["task"], job["rank"], job["tolerances"][0]].append(r)
    for (task, rank, tolerance), some in sorted(moved.items()):
        whole = wide[task, rank]
        if not whole:
            continue
        share = mean([r["parameters"] for r in some]) / mean([r["parameters"] for r in whole])
        loss, full = (mean([r["loss"] for r in rs]) for rs in (some, whole))
        ms, full_ms = (mean([r["ms_per_step"] for r in rs]) for rs in (some, whole))
        quarters = ", ".join(f"{mean(list(q)):.0f}" for q in zip(*(r["ms_by_quarter"] for r in some), strict=True))
        change = 100 * (loss / full - 1)
        lines.append(
            f"| {task} | {tolerance:g} | {share:.3f} | {loss:.4f} | {full:.4f} | {change:+.2f} | {ms:.0f} | "
            f"{full_ms:.0f} | {quarters} |"
        )
    return lines
