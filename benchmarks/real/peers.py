"""Learning rates of the other methods on the real model, for the plan ``peers``."""

from __future__ import annotations

from benchmarks.real.specs import Spec

RATES: dict[str, tuple[float, float, float]] = {
    "lora_plus": (8e-4, 2e-4, 3.2e-3), "soap": (3.2e-3, 8e-4, 1.28e-2), "reflora": (3.2e-3, 8e-4, 2e-4),
    "rslora": (8e-4, 3.2e-3, 2e-4), "dora": (3.2e-3, 8e-4, 2e-4), "muon": (4e-3, 1.6e-2, 1e-3),
    "grit": (3.2e-3, 8e-4, 2e-4), "pissa": (8e-4, 3.2e-3, 2e-4), "eva": (3.2e-3, 8e-4, 2e-4),
    "lora_ga": (3.2e-3, 8e-4, 2e-4), "riemannian": (3.2e-3, 8e-4, 1.28e-2), "lora_rite": (3.2e-3, 8e-4, 1.28e-2),
    "sensitivity": (3.2e-3, 8e-4, 2e-4), "adalora": (3.2e-3, 1.28e-2, 8e-4), "qlora": (3.2e-3, 8e-4, 2e-4),
}  # fmt: skip
"""Three rates of each method, the most promising first; the methods in the order of their loss on a small model.

The best rates on base30m, E2E (results/quality-tuning.jsonl) are the source. AdamW's best rate on the real model is 2.5
times lower than there, so every rate is divided by 2.5 and rounded to the grid. RefLoRA and GRIT, which were not tuned
there, take AdamW's rates.
"""


def by_promise(tasks: list[Spec]) -> list[Spec]:
    """Return every method at its first rate on all tasks, then at its second, then at its third."""
    return [
        {**task, "method": method, "lr": rates[place]}
        for place in range(3)
        for method, rates in RATES.items()
        for task in tasks
    ]
