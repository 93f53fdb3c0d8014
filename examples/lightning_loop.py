"""Lightning: the optimizer in configure_optimizers, and a callback for logs, ranks and checkpoints.

python examples/lightning_loop.py --out runs/lightning        (needs: pip install lightning)
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from common import ASSETS, Batch, collate, encode, load_base, load_tokenizer, read_rows, with_lora
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from ctr_optim import CTROptimizer, RankScheduler
from ctr_optim.integrations.lightning import CTRCallback


class Module(pl.LightningModule):
    """A causal language model with LoRA layers."""

    def __init__(self, steps: int, ranks: RankScheduler | None) -> None:
        super().__init__()
        self.steps, self.ranks = steps, ranks
        self.model = with_lora(load_base(str(ASSETS / "base5m"), torch.device("cpu"), torch.float32), rank=8, seed=0)

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        """Return the loss of one batch."""
        loss: torch.Tensor = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer, the only changed line, and a schedule."""
        optimizer = CTROptimizer(self.parameters(), rank_scheduler=self.ranks)
        schedule = CosineAnnealingLR(optimizer, T_max=self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(argv: list[str] | None = None) -> None:
    """Train the bundled model on a slice of E2E."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/lightning")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--ranks", action="store_true", help="let ranks move between layers")
    args = parser.parse_args(argv)
    pl.seed_everything(0)

    tokenizer = load_tokenizer(str(ASSETS / "base5m"))
    examples = encode(read_rows(ASSETS / "e2e" / "train.jsonl"), tokenizer, 128)
    loader = DataLoader(
        examples,  # type: ignore[arg-type]
        batch_size=8,
        shuffle=True,
        collate_fn=lambda rows: collate(rows, tokenizer.pad_token_id, torch.device("cpu")),
    )
    trainer = pl.Trainer(
        max_steps=args.steps,
        log_every_n_steps=max(1, args.steps // 10),
        default_root_dir=args.out,
        logger=False,
        callbacks=[CTRCallback(args.out)],
    )
    module = Module(args.steps, RankScheduler(interval=max(1, args.steps // 3)) if args.ranks else None)
    trainer.fit(module, loader)  # ckpt_path="last" resumes from the last checkpoint.
    module.model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
