"""Lightning: the optimizer in configure_optimizers, and a callback for logs, ranks and resuming.

python examples/lightning_loop.py --out runs/lightning        (needs: pip install lightning)
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from common import ASSETS, Batch, collate, encode, load_base, load_tokenizer, read_rows, with_lora
from torch.utils.data import DataLoader

from ctr_optim import CTROptimizer, RankScheduler
from ctr_optim.integrations.lightning import CTRCallback


class Module(pl.LightningModule):
    """A causal language model with LoRA layers."""

    def __init__(self, interval: int) -> None:
        super().__init__()
        self.interval = interval
        self.model = with_lora(load_base(str(ASSETS / "base5m"), torch.device("cpu"), torch.float32), rank=8, seed=0)

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        """The loss of one batch."""
        loss: torch.Tensor = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """One changed line."""
        return CTROptimizer(self.parameters(), rank_scheduler=RankScheduler(interval=self.interval))


def main(argv: list[str] | None = None) -> None:
    """Train the bundled model on a slice of E2E."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/lightning")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args(argv)

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
    module = Module(interval=max(1, args.steps // 3))
    trainer.fit(module, loader)  # ckpt_path="last" goes on from the last checkpoint
    module.model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
