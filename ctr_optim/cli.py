"""The ``ctr-optim`` command."""

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
    """Verdict, ranks, KL and trust scale of a run, or of two side by side."""
    if len(args.runs) > 2:
        raise ValueError(f"report: got {len(args.runs)} runs, expected one, or two to compare")
    if args.follow:
        if len(args.runs) > 1:
            raise ValueError("report: --follow shows one run; got two")
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
    """Print a run's log as it grows, until the user interrupts."""

    def wait() -> bool:
        time.sleep(seconds)
        return True

    print(f"{event_file(run)}: Ctrl-C ends, and shows the report", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for line in follow(run, wait):
            print(line, flush=True)


def inspect(args: argparse.Namespace) -> None:
    """Layers of a saved adapter."""
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
    """A key that sorts names as people count: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def export(one: Export, args: argparse.Namespace) -> None:
    """Write a saved adapter in another form."""
    result = one.write(args.adapter, args.out)
    print(f"wrote {args.out}: {one.report.format(result)}")


def compress(args: argparse.Namespace) -> None:
    """Cut a saved adapter to a tolerance."""
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
    """Write the ranks of an adapter that torchtune saved into its config."""
    ranks = fix_torchtune_adapter(args.adapter).values()
    print(f"wrote {args.adapter}: {len(ranks)} layers, ranks {min(ranks)} to {max(ranks)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ctr-optim", description="Look at runs and adapters of ctr_optim.")
    parser.add_argument("--version", action="version", version=f"ctr_optim {__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("report", help="a run's verdict, losses, ranks, KL from base and trust scale")
    one.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory, or its events.jsonl; two to compare")
    one.add_argument("--all", action="store_true", help="list every layer, in the model's order")
    one.add_argument("--follow", action="store_true", help="show a run while it trains; Ctrl-C ends")
    one.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between looks (default: 1)")
    one.add_argument("--png", metavar="FILE", help="draw curves and ranks (needs matplotlib)")
    one.add_argument("--html", metavar="FILE", help="write a page with all of it, one file (needs matplotlib)")
    one.set_defaults(run_command=report)

    one = commands.add_parser("inspect", help="ranks, scalings, norms and sizes of a saved PEFT adapter")
    one.add_argument("adapter", help="a directory with adapter_config.json and adapter_model.safetensors")
    one.set_defaults(run_command=inspect)

    for name, kind in EXPORTS.items():
        one = commands.add_parser(f"export-{name}", help=kind.help)
        one.add_argument("adapter", help="a directory with adapter_config.json and adapter_model.safetensors")
        one.add_argument("out", help="the directory to write")
        one.set_defaults(run_command=partial(export, kind))

    one = commands.add_parser("compress", help="the smallest adapter that costs at most so many nats per token")
    one.add_argument("adapter", help="a directory with adapter_config.json and adapter_model.safetensors")
    one.add_argument("--model", required=True, help="the base model: a directory, or a name on the Hub")
    one.add_argument(
        "--data", required=True, metavar="FILE", help="rows of the task, JSON Lines: prompt and completion"
    )
    one.add_argument("--tolerance", type=float, default=0.01, help="nats per token that it may cost (default: 0.01)")
    one.add_argument("--out", metavar="DIR", help="the directory to write (default: ADAPTER-compressed)")
    one.add_argument("--rank-uniform", action="store_true", help="one rank for all layers, for servers that want that")
    one.add_argument("--multiple", type=int, default=1, metavar="N", help="ranks are multiples of N, such as 8")
    one.add_argument("--rows", type=int, default=256, help="rows that are used at most (default: 256)")
    one.add_argument("--batch", type=int, default=8, help="rows in a forward pass (default: 8)")
    one.add_argument("--max-length", type=int, default=1024, help="tokens of a row at most (default: 1024)")
    one.add_argument("--device", help="where the model runs (default: a GPU, if there is one)")
    one.set_defaults(run_command=compress)

    one = commands.add_parser(
        "fix-torchtune-adapter", help="write ranks that moved into torchtune's adapter_config.json"
    )
    one.add_argument("adapter", help="a directory with adapter_config.json and adapter_model.safetensors")
    one.set_defaults(run_command=fix_torchtune)

    args = parser.parse_args(argv)
    try:
        args.run_command(args)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        missing = isinstance(error, ModuleNotFoundError) and "safetensors" in str(error)
        hint = "; adapters are read with it: pip install 'ctr_optim[hf]'" if missing else ""
        print(f"ctr-optim: {error}{hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
