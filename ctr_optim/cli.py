"""Command line interface: ``ctr-optim``."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ctr_optim import __version__
from ctr_optim.export.compress import compress_files
from ctr_optim.export.files import read_adapter
from ctr_optim.export.registry import EXPORTS, Export
from ctr_optim.export.repair import fix_torchtune_adapter
from ctr_optim.report import columns, follow, read_run, save_page, save_picture, side_by_side, table
from ctr_optim.report.log import event_file


def report(args: argparse.Namespace) -> None:
    """Print the verdict, ranks, KL and trust scale of one run, or of two runs side by side."""
    if len(args.runs) > 2:
        raise ValueError(f"report: got {len(args.runs)} runs, expected one run, or two runs to compare")
    if args.follow:
        if len(args.runs) > 1:
            raise ValueError("report: --follow shows one run, got two; pass one run, or leave out --follow")
        _follow(args.runs[0], args.interval)
    runs = [read_run(run) for run in args.runs]
    print(side_by_side(runs) if len(runs) > 1 else table(runs[0], every=args.all))
    heading = " and ".join(run.name for run in runs)
    if args.png:
        save_picture(runs[0], args.png, *runs[1:])
        print(f"wrote {args.png}")
    if args.html:
        save_page(runs[0], args.html, heading, *runs[1:])
        print(f"wrote {args.html}")


def _follow(run: str, seconds: float) -> None:
    """Print new lines of a run's log until the user presses Ctrl-C."""

    def wait() -> bool:
        time.sleep(seconds)
        return True

    print(f"{event_file(run)}: press Ctrl-C to stop and to show the report", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for line in follow(run, wait):
            print(line, flush=True)


def inspect(args: argparse.Namespace) -> None:
    """Print the layers of a saved adapter."""
    layers = sorted(read_adapter(args.adapter).layers, key=lambda layer: _natural(layer.name))
    rows = [(la.name, str(la.rank), f"{la.scaling:.4g}", f"{la.norm:.4g}", f"{la.parameters:,}") for la in layers]
    print("\n".join(columns(("layer", "rank", "scaling", "|s B A|", "parameters"), rows)))
    ranks = [layer.rank for layer in layers]
    if ranks:
        print(
            f"\n{len(layers)} layers, ranks {min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.2f}, "
            f"{sum(layer.parameters for layer in layers):,} parameters"
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers by value: layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def export(one: Export, args: argparse.Namespace) -> None:
    """Write a saved adapter in another format."""
    result = one.write(args.adapter, args.out)
    print(f"wrote {args.out}: {one.report.format(result)}")


def compress(args: argparse.Namespace) -> None:
    """Cut a saved adapter to a tolerance, and print its size, loss and cost."""
    out = args.out or f"{Path(args.adapter)}-compressed"
    found = compress_files(
        args.adapter, args.model, args.data, args.tolerance, out,
        uniform=args.rank_uniform, multiple=args.multiple, rows=args.rows, batch=args.batch,
        max_length=args.max_length, device=args.device,
    )  # fmt: skip
    done, ranks = found.done, found.done.ranks.values()
    cost = done.loss_after - done.loss_before
    rows = [
        ("parameters", f"{done.parameters_before:,}", f"{done.parameters_after:,}"),
        ("bytes", f"{found.bytes_before:,}", f"{found.bytes_after:,}"),
        ("loss", f"{done.loss_before:.4f}", f"{done.loss_after:.4f}"),
    ]
    print("\n".join(columns(("", "before", "after"), rows)))
    print(
        f"\ncost {done.cost:.3g} nats per token of a tolerance of {args.tolerance:g}: KL {done.kl:.3g}, "
        f"loss {cost:+.3g} on {done.tokens:,} tokens\n"
        f"ranks {min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.2f}; "
        f"{sum(rank == 0 for rank in ranks)} of {len(ranks)} layers lost their adapter\nwrote {out}"
    )


def fix_torchtune(args: argparse.Namespace) -> None:
    """Write the ranks of an adapter that torchtune saved into the adapter's config."""
    ranks = fix_torchtune_adapter(args.adapter).values()
    print(f"wrote {args.adapter}: {len(ranks)} layers, ranks {min(ranks)} to {max(ranks)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit status: 0, or 1 after an error."""
    parser = argparse.ArgumentParser(
        prog="ctr-optim", description="Report on training runs, and inspect, compress and convert saved adapters."
    )
    parser.add_argument("--version", action="version", version=f"ctr_optim {__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("report", help="show a run's verdict, losses, ranks, KL from base and trust scale")
    one.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory or events.jsonl; two runs to compare")
    one.add_argument("--all", action="store_true", help="list every layer, in the model's order")
    one.add_argument("--follow", action="store_true", help="show a run while it trains; stop with Ctrl-C")
    one.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="seconds between updates of --follow (default: 1)"
    )
    one.add_argument("--png", metavar="FILE", help="write a picture of curves and ranks (needs matplotlib)")
    one.add_argument("--html", metavar="FILE", help="write the whole report as one HTML file (needs matplotlib)")
    one.set_defaults(run_command=report)

    one = commands.add_parser("inspect", help="list ranks, scalings, norms and sizes of a saved PEFT adapter")
    one.add_argument("adapter", help="a directory with adapter_config.json and adapter_model.safetensors")
    one.set_defaults(run_command=inspect)

    for name, kind in EXPORTS.items():
        one = commands.add_parser(f"export-{name}", help=kind.help)
        one.add_argument("adapter", help="a directory with adapter_config.json and adapter_model.safetensors")
        one.add_argument("out", help="the directory to write")
        one.set_defaults(run_command=partial(export, kind))

    one = commands.add_parser("compress", help="cut an adapter to the fewest parameters within a tolerance in nats")
    one.add_argument("adapter", help="a directory with adapter_config.json and adapter_model.safetensors")
    one.add_argument("--model", required=True, help="the base model: a directory, or a name on the Hub")
    one.add_argument(
        "--data", required=True, metavar="FILE", help="JSON Lines file with rows of the task: prompt and completion"
    )
    one.add_argument("--tolerance", type=float, default=0.01, help="largest cost, in nats per token (default: 0.01)")
    one.add_argument("--out", metavar="DIR", help="the directory to write (default: ADAPTER-compressed)")
    one.add_argument(
        "--rank-uniform", action="store_true", help="one rank for all layers, for servers that support only one"
    )
    one.add_argument("--multiple", type=int, default=1, metavar="N", help="ranks are multiples of N, such as 8")
    one.add_argument("--rows", type=int, default=256, help="largest number of rows to use (default: 256)")
    one.add_argument("--batch", type=int, default=8, help="rows in one forward pass (default: 8)")
    one.add_argument("--max-length", type=int, default=1024, help="largest number of tokens in a row (default: 1024)")
    one.add_argument("--device", help="device of the model (default: a GPU if there is one, else the CPU)")
    one.set_defaults(run_command=compress)

    one = commands.add_parser(
        "fix-torchtune-adapter", help="write the current ranks into the adapter_config.json that torchtune saved"
    )
    one.add_argument("adapter", help="a directory with adapter_config.json and adapter_model.safetensors")
    one.set_defaults(run_command=fix_torchtune)

    args = parser.parse_args(argv)
    try:
        args.run_command(args)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        missing = isinstance(error, ModuleNotFoundError) and "safetensors" in str(error)
        hint = "; safetensors is needed to read adapters: run pip install 'ctr_optim[hf]'" if missing else ""
        print(f"ctr-optim: {error}{hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
