"""The average of the weights in the Trainer, in Lightning, and over two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import needs_gloo, spawn
from support import batch, loss_of, net, same, snapshot, trainable
from torch.nn.parallel import DistributedDataParallel

from ctr_optim import CTROptimizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore:.*LeafSpec")


def trainer_of(folder: Path, **args: Any) -> Any:
    pytest.importorskip("transformers", reason="Hugging Face's Trainer is an extra")
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    from support import llama_batch, tiny_llama
    from transformers import Trainer, TrainingArguments

    from ctr_optim.integrations.transformers import attach

    rows = llama_batch(n=24)
    data = [{k: rows[k][i] for k in ("input_ids", "labels")} for i in range(24)]
    defaults = dict(
        output_dir=str(folder), max_steps=9, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        disable_tqdm=True, seed=1, lr_scheduler_type="constant", save_steps=3, eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    arguments = TrainingArguments(**{**defaults, **args})
    model = tiny_llama(dtype=torch.float32, task_type="CAUSAL_LM")
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:8])
    return attach(trainer, average=True, calibration_interval=4)


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if "lora_" in k}


def test_the_trainer_evaluates_and_saves_the_average_and_resumes_exactly(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path)
    seen: list[dict[str, torch.Tensor]] = []
    evaluate = whole.evaluate
    whole.evaluate = lambda *a, **k: (seen.append(adapter(whole.model)), evaluate(*a, **k))[1]
    whole.train()
    assert len(seen) == 3
    from safetensors.torch import load_file

    for step, average in zip((3, 6, 9), seen, strict=True):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert {k.replace(".default", ""): v for k, v in average.items()}.keys() == saved.keys()
        assert all(torch.equal(saved[k.replace(".default", "")], v) for k, v in average.items())
    assert same(adapter(whole.model), seen[-1])  # the average stays after the training
    optimizer: Any = whole.optimizer
    while not isinstance(optimizer, CTROptimizer):
        optimizer = optimizer.optimizer
    assert not any("training" in entry for entry in optimizer.state.values())

    again = trainer_of(tmp_path, save_steps=100)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(adapter(again.model), seen[-1])


def test_the_best_averaged_checkpoint_is_loaded(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, load_best_model_at_end=True, metric_for_best_model="runtime", greater_is_better=True)
    seen: list[dict[str, torch.Tensor]] = []
    evaluate, values = trainer.evaluate, iter((3.0, 2.0, 1.0))  # the first evaluation is the best one

    def evaluated(*args: Any, **kwargs: Any) -> dict[str, float]:
        seen.append(adapter(trainer.model))
        return {**evaluate(*args, **kwargs), "eval_runtime": next(values)}

    trainer.evaluate = evaluated
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert same(adapter(trainer.model), seen[0])


def test_epochs_evaluate_the_average_and_an_interrupted_run_resumes_exactly(tmp_path: Path) -> None:
    epochs: dict[str, Any] = dict(max_steps=-1, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch")
    whole, plain = trainer_of(tmp_path, **epochs), trainer_of(tmp_path, max_steps=18, eval_strategy="no", save_steps=99)
    seen: list[dict[str, torch.Tensor]] = []
    evaluate = whole.evaluate
    whole.evaluate = lambda *a, **k: (seen.append(adapter(whole.model)), evaluate(*a, **k))[1]
    whole.train()
    plain.train()
    assert len(seen) == 3 and same(adapter(whole.model), seen[-1])
    assert same(adapter(plain.model), seen[-1])  # evaluations and checkpoints change nothing
    again = trainer_of(tmp_path, **epochs)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert same(adapter(again.model), seen[-1])


def test_lightning_validates_the_average_and_ends_with_it(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not a dependency")
    from torch.utils.data import DataLoader

    from ctr_optim.integrations.lightning import CTRCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.seen = net(dtype=torch.float32), []

        def configure_optimizers(self) -> Any:
            return CTROptimizer(trainable(self), average=True, calibration_interval=4)

        def training_step(self, data: Any, index: int) -> Any:
            ids, labels = batch(self.global_step)
            return loss_of(self.model(ids), labels)

        def validation_step(self, data: Any, index: int) -> None:
            self.seen.append(snapshot(self.model))

    module = Module()
    pl.Trainer(
        max_steps=6, val_check_interval=3, accelerator="cpu", callbacks=[CTRCallback(tmp_path)], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    ).fit(module, DataLoader(range(6)), DataLoader(range(1)))  # fmt: skip
    assert len(module.seen) == 2 and not same(module.seen[0], module.seen[1])
    assert same(snapshot(module.model), module.seen[-1])


def _train(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    model = net()
    wrapped = DistributedDataParallel(model)
    opt = CTROptimizer(trainable(wrapped), model=model, average=True, factor_interval=2, calibration_interval=2)
    for step in range(7):
        opt.zero_grad()
        ids, labels = batch(10 * step + rank, n=9)
        loss_of(wrapped(ids), labels).backward()
        opt.step()
    opt.use_average()
    return snapshot(model)


@needs_gloo
def test_processes_agree_on_the_average(tmp_path: Path) -> None:
    one, two = spawn(_train, tmp_path)
    assert same(one, two)
