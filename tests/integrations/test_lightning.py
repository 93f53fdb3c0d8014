"""Lightning: automatic and manual optimization, and resuming with ``ckpt_path``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import batch, loss_of, net, same, snapshot, trainable
from torch.utils.data import DataLoader

from ctr_optim import CTROptimizer
from ctr_optim.report.log import read_events

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not a dependency")

from ctr_optim.integrations.lightning import CTRCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning", "ignore:.*LeafSpec")

RANKS = dict(interval=3, until=1.0, hysteresis=0.0, window=2, sketch_rank=3)


class Module(pl.LightningModule):
    def __init__(self, manual: bool) -> None:
        super().__init__()
        self.model = net(dtype=torch.float32)
        self.automatic_optimization = not manual

    def configure_optimizers(self) -> Any:
        opt = CTROptimizer(
            trainable(self), lr=0.02, max_kl=1e-3, calibration_interval=4, factor_interval=2, rank_scheduler=RANKS
        )
        if not self.automatic_optimization:
            return opt
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, data: Any, index: int) -> Any:
        ids, labels = batch(self.global_step)  # a resume does not skip seen batches of plain loaders
        loss = loss_of(self.model(ids), labels)
        if self.automatic_optimization:
            return loss
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        return None


def trainer_of(folder: Path, steps: int, **options: Any) -> Any:
    saving = pl.callbacks.ModelCheckpoint(dirpath=folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    return pl.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[CTRCallback(folder), saving], default_root_dir=folder,
        log_every_n_steps=2, enable_progress_bar=False, enable_model_summary=False, logger=False, **options,
    )  # fmt: skip


def loader() -> DataLoader:
    return DataLoader(range(5))


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_resuming_after_rank_events_is_exact(tmp_path: Path, manual: bool) -> None:
    whole, trainer = Module(manual), trainer_of(tmp_path, 10)
    trainer.fit(whole, loader())
    assert {"ctr/mean_rank", "ctr/kl_from_base", "ctr/trust/scale"} <= trainer.callback_metrics.keys()
    events = read_events(tmp_path)
    assert {e["step"] for e in events if e["event"] == "rank"} == {3, 6, 9}
    assert [e["step"] for e in events if e["event"] == "log"] == [2, 4, 6, 8, 10]
    assert trainer.optimizers[0].rank_scheduler.total_steps == 10

    again = Module(manual)
    trainer_of(tmp_path, 10).fit(again, loader(), ckpt_path=tmp_path / "step=4.ckpt")
    assert same(snapshot(whole), snapshot(again))
    assert read_events(tmp_path)[-1]["ranks"] == events[-1]["ranks"]


def test_accumulation_and_clipping(tmp_path: Path) -> None:
    module = Module(manual=False)
    trainer = trainer_of(tmp_path, 4, accumulate_grad_batches=2, gradient_clip_val=1.0)
    trainer.fit(module, loader())
    assert trainer.optimizers[0].steps == 4
    assert trainer.optimizers[0].metrics()["trust/source"] == "measured"
