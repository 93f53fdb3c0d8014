"""Reinforcement learning with a verifiable reward: ``python -m benchmarks.rl COMMAND --help``.

run      train every run of a plan with GRPO, on every GPU or on the CPU; one JSON line for each run
report   print Markdown tables from such lines
"""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = ("run", "report")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise SystemExit(__doc__)
    import_module(f"benchmarks.rl.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
