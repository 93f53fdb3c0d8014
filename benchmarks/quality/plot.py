"""Plot the final loss over learning rates.

python -m benchmarks.quality.plot benchmarks/results/quality-h200.jsonl docs/robustness.png
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(results: str, picture: str) -> None:
    losses: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    with open(results) as lines:
        for record in map(json.loads, lines):
            spec = record["spec"]
            if record["phase"] == "final" and (spec["base"], spec["task"]) == ("base5m", "e2e") and not spec["options"]:
                losses[spec["method"]][spec["lr"]].append(record["loss"])
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for method, name in (("adamw", "AdamW"), ("ctr", "CTROptimizer")):
        rates = sorted(losses[method])
        axes.plot(rates, [statistics.mean(losses[method][r]) for r in rates], "o-", label=name)
    axes.set(xscale="log", ylim=(1.2, 1.8), xlabel="learning rate", ylabel="validation loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:3])
