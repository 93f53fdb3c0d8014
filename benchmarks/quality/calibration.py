"""Predicted against measured KL: does a bound in nats hold in nats?

    python -m benchmarks.quality.calibration --data DIR --models DIR --out calibration.jsonl [--steps 150]

Trains with CTROptimizer at its defaults. Every third step the program compares the model's outputs before and after the
step, on the training batch and on a fresh batch. It divides the step's predicted KL, calibrated and uncalibrated, by
the measured KL. It also divides ``kl_from_base`` by the measured KL of the fresh batch from the base model. Over all
steps, it counts violations of the bound (predicted KL above the bound by more than a factor of 1 + 1e-4) and the
forward passes per step that measurements cost.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality import tasks
from ctr_optim import CTROptimizer


@torch.no_grad()
def target_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the log-probabilities at the loss tokens, ``(n, V)``."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return logits[batch["labels"][:, 1:] != -100].float().log_softmax(-1)


def kl(before: Tensor, after: Tensor) -> float:
    """Return the mean ``KL(before || after)`` over tokens, in nats."""
    return float((before.exp() * (before - after)).sum(-1).mean())


def quantiles(values: list[float]) -> dict[str, float]:
    """Return the 5 % quantile, the median, the 95 % quantile and the count."""
    cuts = statistics.quantiles(values, n=20)
    return {"p5": cuts[0], "median": statistics.median(values), "p95": cuts[-1], "count": len(values)}


class Counted:
    """Counts the sequences of an optimizer's measurement passes."""

    def __init__(self, optimizer: CTROptimizer) -> None:
        self.sequences, self.probe = 0, optimizer._trust.coupling.prober
        self.logits, self.probe.logits = self.probe.logits, self

    def __call__(self) -> Tensor | None:
        """Count the sequences of one measurement pass and run it."""
        self.sequences += self.probe._call.sequences
        return self.logits()


def run(base: str, task: str, steps: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one training and return the quantiles of its ratios."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(args.models) / base
    tokenizer = AutoTokenizer.from_pretrained(path)
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    model.to(device)
    examples = tasks.encode(tasks.load_rows(Path(args.data), task, "train"), tokenizer)
    stream = list(tasks.batches(examples, batch, steps + 1, args.seed, device))
    optimizer = CTROptimizer(model.parameters(), max_kl=args.max_kl, calibration_interval=args.interval)
    rerun = Counted(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    ratios: dict[str, list[float]] = {
        what: [] for what in ("same batch", "fresh batch", "same batch, uncalibrated", "from base")
    }
    violations, losses = 0, []
    for step in range(steps):
        loss = model(**stream[step]).loss
        loss.backward()
        measure = step % 3 == 1
        before = [target_logits(model, stream[i]) for i in (step, step + 1)] if measure else []
        optimizer.step()
        metrics = optimizer.metrics()
        violations += metrics["trust/predicted_kl"] > metrics["trust/max_kl"] * (1 + 1e-4)
        losses.append(float(loss))
        if measure and metrics["trust/max_kl"] > 1e-4:  # Below, rounding of float32 logits dominates the KL.
            same, fresh = (
                kl(b, target_logits(model, stream[i])) for b, i in zip(before, (step, step + 1), strict=True)
            )
            ratios["same batch"].append(metrics["trust/predicted_kl"] / same)
            ratios["fresh batch"].append(metrics["trust/predicted_kl"] / fresh)
            ratios["same batch, uncalibrated"].append(metrics["trust/predicted_kl"] / metrics["trust/coupling"] / same)
        if measure:
            here = target_logits(model, stream[step + 1])
            with model.disable_adapter():
                distance = kl(here, target_logits(model, stream[step + 1]))
            ratios["from base"].append(metrics["kl_from_base"] / distance)
        optimizer.zero_grad()
        schedule.step()
    return {
        "base": base, "task": task, "steps": steps, "batch": batch, "seed": args.seed, "max_kl": args.max_kl,
        "interval": args.interval,
        "violations": violations, "forward_passes_per_step": round(rerun.sequences / batch / steps, 4),
        "same": [round(r, 3) for r in ratios["same batch"]], "fresh": [round(r, 3) for r in ratios["fresh batch"]],
        "from_base": [round(r, 3) for r in ratios["from base"]],
        "ratios": {name: quantiles(values) for name, values in ratios.items()}, "final_loss": sum(losses[-10:]) / 10,
        "versions": {"torch": torch.__version__, "device": device.type},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--base", default="base5m")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-kl", type=float, default=0.1)
    parser.add_argument("--interval", type=int, default=50, help="most steps between two measurements")
    parser.add_argument("--tasks", default="e2e,gsm8k")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for task in args.tasks.split(","):
        record = run(args.base, task, args.steps, args.batch, args)
        print(json.dumps(record, indent=1))
        with open(args.out, "a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
