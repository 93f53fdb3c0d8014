"""Evaluation results of trainers are written to the event log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctr_optim.report import read_run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the trainer")
    pytest.importorskip("peft", reason="the adapter is PEFT's")
    from integrations.test_transformers import trainer_of

    trainer = trainer_of(tmp_path, "factory", eval_strategy="steps", eval_steps=4)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    steps, values = read_run(tmp_path).series("eval_loss")
    assert losses and dict(zip(steps, values, strict=True)) == losses


def test_lightning(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="the trainer")
    import torch
    from support import batch, loss_of, net, plain_bound, trainable

    from ctr_optim.integrations.lightning import CTRCallback

    seen: list[float] = []

    class Module(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net(dtype=torch.float32)

        def training_step(self, data: Any, index: int) -> Any:
            return loss_of(self.net(data[0]), data[1])

        def validation_step(self, data: Any, index: int) -> None:
            loss = loss_of(self.net(data[0]), data[1])
            seen.append(float(loss))
            self.log("val_loss", loss)

        def configure_optimizers(self) -> Any:
            return plain_bound(trainable(self))

    trainer = pl.Trainer(
        max_epochs=2, default_root_dir=tmp_path, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[CTRCallback(tmp_path)], accelerator="cpu",
    )  # fmt: skip
    loaders = [torch.utils.data.DataLoader([batch(i)], batch_size=None) for i in (0, 1)]
    trainer.fit(Module(), *loaders)
    assert read_run(tmp_path).series("val_loss")[1] == pytest.approx(seen[-2:])
