"""Growth of the optimizer's cost with rank, layers, tokens and width, on a stack of plain LoRA layers.

python -m benchmarks.performance.scaling --hidden 4096 --layers 64 --out scaling.jsonl --plot scaling.png
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.performance.common import Clock, Report, kind_of, state_bytes, table
from ctr_optim import CTROptimizer

LLAMA_70B = dict(hidden=8192, wide=28672, kv=1024, blocks=80)


class Layer(nn.Module):
    """``y = s B A x``: a LoRA layer without its frozen weight, whose cost does not depend on the optimizer."""

    scaling = 2.0

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * self.lora_B(self.lora_A(x))


def state_formula(d_in: int, d_out: int, rank: int) -> int:
    """Return the bytes of a layer's state at the defaults: moments, bases, rank factors, diagonals, three counters."""
    return 4 * (2 * rank * (d_in + d_out) + 4 * rank**2 + d_in + d_out + 3)


def model_shapes(hidden: int, wide: int, kv: int) -> list[tuple[int, int]]:
    """Return ``(d_in, d_out)`` of the linear layers of a Llama block."""
    attention = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    return [*attention, (hidden, wide), (hidden, wide), (wide, hidden)]


def measure(device: torch.device, hidden: int, layers: int, rank: int, tokens: int, repeats: int) -> dict[str, float]:
    """Return medians in ms: forward and backward with hooks off and on, and the step by kind."""
    with device:
        stack = nn.ModuleList([Layer(hidden, hidden, rank) for _ in range(layers)])
        x = torch.randn(tokens, hidden)
    clock, optimizer = Clock(device), CTROptimizer(stack.parameters(), model=stack, calibration_interval=None)
    found: dict[str, list[float]] = {}

    def model() -> None:
        for layer in stack:
            layer(x).square().mean().backward()

    for index in range(20 + 20 * repeats):
        kind = kind_of(optimizer)
        times = clock.alone(model), clock.alone(optimizer.step)
        optimizer.zero_grad()
        if index >= 20:
            found.setdefault("model, taps off" if kind == "plain" else "model, taps on", []).append(times[0])
            found.setdefault(f"step, {kind}", []).append(times[1])
    return {name: statistics.median(times) for name, times in found.items()}


def check_memory(report: Report, device: torch.device, rank: int) -> None:
    """Compare the measured state of one block of a 70B shape with the formula, and report the whole model's state."""
    shapes = model_shapes(LLAMA_70B["hidden"], LLAMA_70B["wide"], LLAMA_70B["kv"])
    with device:
        block = nn.ModuleList([Layer(d_in, d_out, rank) for d_in, d_out in shapes])
        inputs = [torch.randn(2, d_in) for d_in, _ in shapes]
    optimizer = CTROptimizer(block.parameters(), model=block, calibration_interval=None)
    for layer, x in zip(block, inputs, strict=True):
        layer(x).square().mean().backward()
    optimizer.step()
    measured, formula = state_bytes(optimizer), sum(state_formula(*shape, rank) for shape in shapes)
    adamw = sum(8 * rank * (d_in + d_out) + 8 for d_in, d_out in shapes)
    report.add(
        "memory",
        rank=rank,
        block_bytes=measured,
        formula_bytes=formula,
        model_bytes=formula * LLAMA_70B["blocks"],
        adamw_model_bytes=adamw * LLAMA_70B["blocks"],
        ratio=formula / adamw,
    )
    if measured != formula:
        raise AssertionError(f"state of a block: got {measured} bytes, expected {formula} by the formula")


def plot(report: Report, path: str) -> None:
    """Draw one panel per varied quantity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({line["axis"] for line in report.lines if line["what"] == "scaling"})
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.5), sharey=True, squeeze=False)
    for panel, name in zip(axes[0], names, strict=True):
        lines = [line for line in report.lines if line.get("axis") == name]
        for kind in lines[0]["ms"]:
            panel.loglog([line[name] for line in lines], [line["ms"][kind] for line in lines], "o-", ms=3, label=kind)
        values = [line[name] for line in lines]
        panel.set_xticks(values, [str(value) for value in values], fontsize=8)
        panel.minorticks_off()
        panel.set_xlabel(name)
    axes[0][0].set_ylabel("ms")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in (("hidden", 4096), ("layers", 64), ("rank", 16), ("tokens", 4096), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ranks", type=numbers, default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--layer-counts", type=numbers, default=[16, 32, 64, 128, 224])
    parser.add_argument("--token-counts", type=numbers, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--widths", type=numbers, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--out")
    parser.add_argument("--plot")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    report = Report(args.out, device)
    centre = {name: getattr(args, name) for name in ("hidden", "layers", "rank", "tokens")}
    sweeps = {"rank": args.ranks, "layers": args.layer_counts, "tokens": args.token_counts, "hidden": args.widths}
    for axis, values in sweeps.items():
        for value in values:
            point: dict[str, Any] = {**centre, axis: value}
            report.add("scaling", axis=axis, **point, ms=measure(device, repeats=args.repeats, **point))
    for rank in (16, 64):
        check_memory(report, device, rank)
    if args.plot:
        plot(report, args.plot)
    rows = [(f"{x['axis']}={x[x['axis']]}", *x["ms"].values()) for x in report.lines if x["what"] == "scaling"]
    table(rows, ("ms", *report.lines[0]["ms"]))


if __name__ == "__main__":
    main()
