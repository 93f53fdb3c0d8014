"""Rank events and the loss: does the loss jump, and what does keeping the optimizer's state gain?

    python -m benchmarks.ranks.continuity --out lines.jsonl [--schedules default,hasty] [--seeds 0] [--png jumps.png]

Trains base5m on E2E (the bundled assets). Measures the loss of the same held-out rows after every step, and directly
before and after each rank event. The schedule ``hasty`` moves ranks every ten steps without a limit. Each schedule runs
twice: once the events keep the optimizer's state, once the state is reset at each event, as in a new optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality import tasks
from benchmarks.quality.methods import forget_state
from ctr_optim import CTROptimizer, RankEvent

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
SCHEDULES: dict[str, dict[str, Any]] = {
    "default": {"interval": 25, "until": 0.6},
    "hasty": {"interval": 10, "until": 0.9, "hysteresis": 0.0, "max_change": None},
}


class Watched(CTROptimizer):
    """An optimizer that calls ``around(hold)`` when a rank event is due; ``hold()`` runs the event."""

    around: Any = None

    def _reallocate(self) -> None:
        hold = super()._reallocate
        due = self._ranks is not None and self._ranks.scheduler.next_event(self.steps) == self.steps
        if due and self.around is not None:
            self.around(hold)
        else:
            hold()


def run(schedule: str, carry: bool, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one training; return the held-out loss by step and around each event."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "base5m")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "base5m", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).to(device).train()
    examples = tasks.encode(tasks.load_rows(ASSETS, "e2e", "train"), tokenizer)
    train, held = tasks.validation_split(examples, args.held)
    scheduler = {**SCHEDULES[schedule], "total_steps": args.steps}
    optimizer = Watched(model.parameters(), rank_scheduler=scheduler)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / args.steps)))
    changes: list[RankEvent] = []
    optimizer.on_rank_event(changes.append)
    events: list[dict[str, Any]] = []

    def around(hold: Any) -> None:
        before, count = tasks.loss_per_token(model, held, device), len(changes)
        hold()
        after = tasks.loss_per_token(model, held, device)
        new = changes[count:]
        events.append({
            "step": optimizer.steps, "before": before, "after": after, "layers": len(new),
            "dropped": sum(e.old_rank - e.kept for e in new), "added": sum(e.new_rank - e.kept for e in new),
        })  # fmt: skip
        if not carry:
            forget_state(optimizer)

    optimizer.around = around
    curve, start = [tasks.loss_per_token(model, held, device)], time.time()
    for batch in tasks.batches(train, args.batch, args.steps, seed, device):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        curve.append(tasks.loss_per_token(model, held, device))
    return {
        "schedule": schedule, "carry": carry, "seed": seed, "steps": args.steps, "batch": args.batch, "rank": 8,
        "scheduler": SCHEDULES[schedule], "held": len(held), "events": events, "curve": [round(c, 6) for c in curve],
        "loss": curve[-1], "largest_jump": max((e["after"] / e["before"] - 1 for e in events), default=0.0),
        "seconds": time.time() - start, "versions": {"torch": torch.__version__, "device": device.type},
    }  # fmt: skip


def picture(records: list[dict[str, Any]], file: str) -> None:
    """Draw the held-out loss by step of the first seed, one panel per schedule, with the events."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = [r for r in records if r["seed"] == records[0]["seed"]]
    schedules = list(dict.fromkeys(r["schedule"] for r in first))
    figure, axes = plt.subplots(1, len(schedules), figsize=(5 * len(schedules), 3.4), sharey=True, squeeze=False)
    for axis, schedule in zip(axes[0], schedules, strict=True):
        for record in (r for r in first if r["schedule"] == schedule):
            kept = record["carry"]
            axis.plot(
                record["curve"], color="C0" if kept else "C3", label="state carried" if kept else "state forgotten"
            )
            for event in record["events"]:
                axis.axvline(event["step"], color="0.8", linewidth=0.8, zorder=0)
        axis.set(yscale="log", xlabel="step", title=f"{schedule}: every {record['scheduler']['interval']} steps")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("held-out loss (nats per token)")
    axes[0][-1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--png")
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held", type=int, default=32, help="approximate number of held-out rows")
    args = parser.parse_args()
    for seed in map(int, args.seeds.split(",")):
        for schedule in args.schedules.split(","):
            for carry in (True, False):
                record = run(schedule, carry, seed, args)
                jump = f"largest jump {record['largest_jump']:.2%}"
                print(schedule, "carried" if carry else "forgotten", f"{record['loss']:.4f}", jump, flush=True)
                with open(args.out, "a") as lines:
                    lines.write(json.dumps(record) + "\n")
    if args.png:
        with open(args.out) as lines:
            picture([json.loads(line) for line in lines], args.png)


if __name__ == "__main__":
    main()
