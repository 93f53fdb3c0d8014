"""Callback for Lightning, with automatic or manual optimization: ``Trainer(callbacks=[CTRCallback()])``."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl

from ctr_optim.integrations import accept_ranks, check_ownership, set_length, unwrap
from ctr_optim.report.log import EventLog, scalars


class CTRCallback(pl.Callback):
    """Log the optimizer's metrics through ``log_dict``, and connect the Trainer with the rank scheduler.

    The callback lets ``ckpt_path`` resume after ranks have moved. If ``RankScheduler.total_steps`` is None, the
    callback sets it to the number of steps that the Trainer expects. With ``average=True``, the module holds the
    average of the weights during validation and after the training. Checkpoints contain the training weights.

    Args:
        events: file or directory of the event log; None for the Trainer's log directory.
    """

    def __init__(self, events: str | os.PathLike[str] | None = None) -> None:
        self.events = events
        self._log: EventLog | None = None
        self._hooks: list[Any] = []
        self._average = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the model load weights of any rank, because Lightning loads it before it builds the optimizer."""
        if stage == "fit":
            self._hooks = accept_ranks(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the optimizer, set the scheduler's length, and open the event log. The checkpoint is loaded already.

        Raises:
            TypeError: the Trainer's first optimizer is not a CTROptimizer.
            ValueError: the optimizer owns no trainable parameter of the module.
        """
        for hook in self._hooks:
            hook.remove()
        optimizer = unwrap(trainer.optimizers[0])
        check_ownership(optimizer, pl_module)
        total = trainer.estimated_stepping_batches
        set_length(optimizer, int(total) if total != float("inf") else 0)
        if self._log is None or self._log.optimizer is not optimizer:
            self._log = EventLog(optimizer, self.events or trainer.log_dir or trainer.default_root_dir)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the metrics every ``log_every_n_steps`` steps."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._log is not None and trainer.global_step % every == 0:
            losses = {"loss": float(outputs["loss"])} if isinstance(outputs, dict) and "loss" in outputs else {}
            pl_module.log_dict(scalars(self._log.log(**losses)))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the module hold the average of the weights if the optimizer keeps one."""
        if trainer.optimizers and not trainer.sanity_checking:
            optimizer = unwrap(trainer.optimizers[0])
            if optimizer.averages:
                self._average.enter_context(optimizer.averaged())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the module keep the average of the weights."""
        optimizer = unwrap(trainer.optimizers[0])
        if optimizer.averages:
            optimizer.use_average()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the training weights, and write the validation losses to the event log."""
        self._average.close()
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name}
        if self._log is not None and found and not trainer.sanity_checking:
            self._log.evaluated(**found)
