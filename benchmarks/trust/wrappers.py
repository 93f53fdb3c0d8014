"""Training of the matrix's tiny model under each wrapper; every function returns the losses and a meter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.trust.tiny import ROWS, Meter, adapted, batch_of, model_of, predictions
from ctr_optim import CTROptimizer
from ctr_optim.integrations import unwrap

TOKENIZER = Path(__file__).parents[2] / "examples" / "assets" / "base5m"
TRL = ("SFT", "DPO", "KTO", "GRPO", "RLOO")
DISTRIBUTED = ("DDP, optimizer first", "DDP, model first", "DDP unused, optimizer first", "DDP unused, model first")
ALONE = ("none", "Accelerate", "Lightning", "Trainer")
WRAPPERS = (*ALONE, *(f"TRL {name}" for name in TRL), *DISTRIBUTED, "FSDP2")

Result = tuple[list[float], Meter]


def train(wrapper: str, adapter: str, form: str, steps: int, folder: Path) -> Result:
    """Train one cell of the matrix."""
    if wrapper.startswith("TRL"):
        return with_trl(wrapper.removeprefix("TRL "), adapter, steps, folder)
    model = adapted(model_of(form), adapter)
    if wrapper == "Trainer":
        return with_trainer(model, form, steps, folder)
    if wrapper == "Lightning":
        return with_lightning(model, form, steps, folder)
    return in_a_loop(wrapper, model, form, steps)


def optimizer_of(model: nn.Module) -> CTROptimizer:
    """Return a CTROptimizer of the trained parameters with all defaults."""
    return CTROptimizer([p for p in model.parameters() if p.requires_grad])


def loss_of(output: Any) -> Tensor:
    """Return the loss of a model's output."""
    loss: Tensor = output[0] if isinstance(output, tuple) else output.loss
    return loss


def in_a_loop(wrapper: str, model: nn.Module, form: str, steps: int) -> Result:
    """Train in a plain loop: no wrapper, DistributedDataParallel in both orders, FSDP2 or Accelerate."""
    step = 0
    inner, backward = model, torch.Tensor.backward
    if wrapper.startswith("DDP"):
        unused = "unused" in wrapper
        early = optimizer_of(model) if "optimizer first" in wrapper else None
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        optimizer: Any = early or optimizer_of(model)
    elif wrapper == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
        optimizer = optimizer_of(model)
    elif wrapper == "Accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        backward = accelerator.backward
    else:
        optimizer = optimizer_of(model)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

    def batch() -> dict[str, Tensor]:
        return batch_of(form, step * world + rank)

    def run() -> Tensor:
        if wrapper == "FSDP2":  # Without it the forward reads the gathered weights of the previous forward.
            inner.reshard()
        return everywhere(predictions(inner, form, batch()))

    meter = Meter(unwrap(optimizer), run)
    losses = []
    for step in range(steps):  # noqa: B007 -- The closures read it.
        optimizer.zero_grad()
        loss = loss_of(model(**batch()))
        backward(loss)
        optimizer.step()
        losses.append(float(loss))
    return losses, meter


def everywhere(log_p: Tensor) -> Tensor:
    """Return the predictions of all processes, because the bound is a mean over the whole batch."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return log_p
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, log_p)
    return torch.cat(parts)


def rows_of(form: str, steps: int) -> list[dict[str, Tensor]]:
    """Return the batches of a run, row by row."""
    rows = []
    for step in range(steps):
        batch = batch_of(form, step)
        rows += [{name: value[i] for name, value in batch.items()} for i in range(ROWS)]
    return rows


class Recorder:
    """Stores the inputs of the last training forward."""

    def __init__(self, form: str) -> None:
        self.form, self.batch, self.losses = form, None, []

    def run(self, model: nn.Module) -> Tensor | None:
        """Return the predictions for the stored inputs with the present parameters."""
        return None if self.batch is None else predictions(model, self.form, self.batch)


def with_trainer(model: nn.Module, form: str, steps: int, folder: Path) -> Result:
    """Train with Hugging Face's Trainer."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**arguments(steps, folder), per_device_train_batch_size=ROWS)
    trainer = Trainer(model=model, args=args, train_dataset=rows_of(form, steps))
    return run_trainer(trainer, form, lambda inputs: inputs)


def arguments(steps: int, folder: Path) -> dict[str, Any]:
    """Return the arguments of every trainer that derives from Trainer: logging and saving off, constant rate."""
    return dict(
        output_dir=str(folder), max_steps=steps, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
        lr_scheduler_type="constant", logging_strategy="no", seed=0,
    )  # fmt: skip


def run_trainer(trainer: Any, form: str, inputs_of: Callable[[dict[str, Any]], dict[str, Tensor]]) -> Result:
    """Train through ``attach`` and measure every step on the last inputs of ``compute_loss``."""
    from transformers import PrinterCallback

    from ctr_optim.integrations.transformers import attach

    recorder, original, build = Recorder(form), trainer.compute_loss, trainer.create_optimizer
    meters: list[Meter] = []

    def compute_loss(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        recorder.batch = {name: t.clone() for name, t in inputs_of(inputs).items()}
        loss = original(model, inputs, *args, **kwargs)
        recorder.losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
        return loss

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = build(*args, **kwargs)
        if not meters:
            meters.append(Meter(unwrap(optimizer), lambda: recorder.run(trainer.model)))
        return optimizer

    trainer.compute_loss, trainer.create_optimizer = compute_loss, create_optimizer
    trainer.remove_callback(PrinterCallback)
    attach(trainer).train()
    return recorder.losses, meters[0]


TEXTS = ["A tale of two cities.", "Call me Ishmael.", "It was a dark night.", "All happy families are alike."] * 4
PAIRS = {"prompt": ["Say: "] * 16, "chosen": TEXTS, "rejected": [text[::-1] for text in TEXTS]}
JUDGED = {"prompt": ["Say: "] * 16, "completion": TEXTS, "label": [True, False] * 8}
REWARDED = dict(max_completion_length=6, num_generations=4, temperature=1.0)
DATA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SFT": ({"text": TEXTS}, dict(max_length=16)),
    "DPO": (PAIRS, dict(max_length=24)),
    "KTO": (JUDGED, dict(max_length=24)),
    "GRPO": ({"prompt": TEXTS}, REWARDED),
    "RLOO": ({"prompt": TEXTS}, REWARDED),
}


def with_trl(name: str, adapter: str, steps: int, folder: Path) -> Result:
    """Train with one of TRL's trainers, with the trainer's own loss."""
    import datasets
    import trl
    from transformers import AutoTokenizer

    data, options = DATA[name]
    base = model_of("attached", vocabulary=8192)
    extra: dict[str, Any] = {}
    if adapter == "whole model" and name in ("DPO", "KTO"):
        extra["ref_model"] = copy.deepcopy(base)
    if name in ("GRPO", "RLOO"):
        extra["reward_funcs"] = lambda completions, **_: [float(len(text) % 7) for text in completions]
    if adapter == "whole model" and name in ("GRPO", "RLOO"):
        options = {**options, "beta": 0.0}  # TRL would load the reference model by name, and this model has no name.
    if adapter in ("only A", "only B"):  # With checkpointing, TRL's adapter switch makes A and B trainable again.
        options = {**options, "gradient_checkpointing": False}
    config = getattr(trl, f"{name}Config")(
        **arguments(steps, folder), per_device_train_batch_size=4, bf16=False, **options
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=adapted(base, adapter), args=config, train_dataset=datasets.Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER), **extra,
    )  # fmt: skip
    return run_trainer(trainer, "attached", inputs_of_trl)


def inputs_of_trl(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return token ids, mask and labels of a batch of any of TRL's trainers."""
    if "prompt_ids" in inputs:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        present = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        counts = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], 1)
        if "advantages" in inputs:  # A sequence with an advantage of 0 has no gradient.
            counts = counts * (inputs["advantages"] != 0).view(-1, 1)
    else:
        ids, present = inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        counts = inputs["completion_mask"] if "completion_mask" in inputs else inputs["labels"] != -100
    return {"input_ids": ids, "attention_mask": present, "labels": ids.masked_fill(counts == 0, -100)}


def with_lightning(model: nn.Module, form: str, steps: int, folder: Path) -> Result:
    """Train with Lightning and automatic optimization."""
    import lightning.pytorch as pl

    from ctr_optim.integrations.lightning import CTRCallback

    recorder = Recorder(form)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            recorder.batch = batch
            self.meter.start()
            loss = loss_of(self.model(**batch))
            recorder.losses.append(float(loss))
            return loss

        def configure_optimizers(self) -> Any:
            self.meter = Meter(optimizer := optimizer_of(self), lambda: recorder.run(model), closure=True)
            return optimizer

    module = Module()
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[CTRCallback(folder)], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows_of(form, steps), ROWS))
    return recorder.losses, module.meter
