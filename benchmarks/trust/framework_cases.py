"""Frameworks, driven through their own entry points on the base model of the examples; each case returns measurements.

Every case trains ``examples/assets/base5m`` with a LoRA adapter through the framework's own code, from its config or
its command line to its optimizer builder, and measures each step on the batches that made it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.trust.tiny import Meter
from ctr_optim.integrations import unwrap
from ctr_optim.optimizer import CTROptimizer

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
BASE, ROWS_FILE = ASSETS / "base5m", ASSETS / "e2e" / "train.jsonl"
ROWS = 4  # sequences in a micro-batch


class Observer:
    """Measures every step of an optimizer on all micro-batches since the step before.

    Attributes:
        meter, optimizer: None until the first micro-batch.
        losses: of the micro-batches.
    """

    def __init__(self) -> None:
        self.meter: Meter | None = None
        self.optimizer: CTROptimizer | None = None
        self.losses: list[float] = []
        self._runs: list[Callable[[], Tensor]] = []

    def saw(self, optimizer: Any, predict: Callable[[], Tensor]) -> None:
        """Take note of a micro-batch; ``predict`` returns log-probabilities ``(n, V)`` of the loss's tokens."""
        if self.meter is None:
            self.optimizer = inner = unwrap(optimizer)
            self.meter = Meter(inner, lambda: torch.cat([run() for run in self._runs]) if self._runs else None)
            inner.register_step_post_hook(lambda *_: self._runs.clear())
        self._runs.append(predict)


def predicted(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """Log-probabilities ``(n, V)`` of the tokens that ``labels`` count, as a causal model predicts them."""
    logits: Any = model(**inputs)
    logits = getattr(logits, "logits", logits)
    return logits.float().log_softmax(-1)[:, :-1][labels[:, 1:] != -100]


@contextmanager
def observing_trainers() -> Iterator[Observer]:
    """Observe every Trainer of transformers, and what derives from it, through ``training_step``."""
    from transformers import Trainer

    observer, original = Observer(), Trainer.training_step

    def training_step(self: Any, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        kept = {k: v.clone() for k, v in inputs.items() if k in ("input_ids", "attention_mask", "position_ids")}
        labels = inputs["labels"].clone()
        observer.saw(self.optimizer, lambda: predicted(model, kept, labels))
        loss = original(self, model, inputs, *args, **kwargs)
        observer.losses.append(float(loss))
        return loss

    Trainer.training_step = training_step  # type: ignore[method-assign]
    try:
        yield observer
    finally:
        Trainer.training_step = original  # type: ignore[method-assign]


def rows(count: int) -> list[dict[str, str]]:
    """The first rows of the E2E data: ``prompt`` and ``target``."""
    with ROWS_FILE.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def write_rows(file: Path, count: int, make: Callable[[dict[str, str]], dict[str, Any]]) -> Path:
    """Write rows in a framework's own format, one JSON object a line."""
    file.write_text("".join(json.dumps(make(row)) + "\n" for row in rows(count)), encoding="utf-8")
    return file


def as_instruction(row: dict[str, str]) -> dict[str, Any]:
    """Alpaca's format."""
    return {"instruction": row["prompt"], "input": "", "output": row["target"]}


def as_messages(row: dict[str, str]) -> dict[str, Any]:
    """OpenAI's format."""
    return {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["target"]}]}


def axolotl(steps: int, folder: Path, **changes: Any) -> Observer:
    """``axolotl train``: the YAML of docs/integrations.md, its CLI's ``do_train``."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    data = write_rows(folder / "rows.jsonl", ROWS * steps * 2, as_instruction)
    config = {
        "base_model": str(BASE), "tokenizer_config": str(BASE), "plugins": ["ctr_optim.integrations.axolotl.CTRPlugin"],
        "ctr": {"max_kl": 0.1}, "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True,
        "datasets": [{"path": str(data), "type": "alpaca", "ds_type": "json"}], "val_set_size": 0,
        "dataset_prepared_path": str(folder / "prepared"), "output_dir": str(folder / "out"), "sequence_len": 128,
        "micro_batch_size": ROWS, "gradient_accumulation_steps": 1, "max_steps": steps, "optimizer": "adamw_torch",
        "learning_rate": 2e-4, "lr_scheduler": "constant", "save_strategy": "no", "bf16": False, "fp16": False,
        "tf32": False, "flash_attention": False, "attn_implementation": "eager", "sample_packing": False,
        "dataset_num_proc": 1,
        "special_tokens": {"pad_token": "<|pad|>"}, "logging_steps": 10, "use_tensorboard": False, **changes,
    }  # fmt: skip
    file = folder / "axolotl.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    with observing_trainers() as observer:
        do_train(load_cfg(str(file)), TrainerCliArgs())
    return observer


def llamafactory_v0(steps: int, folder: Path, **changes: Any) -> Observer:
    """``install()`` and ``run_exp``, as the page tells, in place of ``llamafactory-cli train``."""
    from llamafactory.train.tuner import run_exp

    from ctr_optim.integrations.llamafactory import install
    from ctr_optim.integrations.transformers import CTRCallback

    install(max_kl=0.1)
    write_rows(folder / "rows.jsonl", ROWS * steps * 2, as_instruction)
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}), encoding="utf-8")
    config = {
        "model_name_or_path": str(BASE), "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8,
        "lora_target": "all", "dataset": "rows", "dataset_dir": str(folder), "template": "alpaca", "cutoff_len": 128,
        "output_dir": str(folder / "out"), "max_steps": steps, "per_device_train_batch_size": ROWS, "report_to": "none",
        "lr_scheduler_type": "constant", "save_strategy": "no", "use_cpu": True, "overwrite_cache": True,
        "disable_tqdm": True, **changes,
    }  # fmt: skip
    with observing_trainers() as observer:
        run_exp(config, callbacks=[CTRCallback()])
    return observer


def llamafactory_v1(steps: int, folder: Path) -> Observer:
    """Version 1's ``run_sft`` with ``optim_config: {name: ctr, max_kl: 0.1}``."""
    from llamafactory.v1.trainers import sft_trainer

    import ctr_optim.integrations.llamafactory  # noqa: F401 -- registers the optimizer

    data = write_rows(folder / "rows.jsonl", ROWS * steps * 2, as_instruction)
    info = folder / "rows.yaml"
    info.write_text(yaml.safe_dump({"rows": {"path": str(data), "source": "local", "converter": "alpaca"}}))
    config = {
        "model": str(BASE), "template": "chatml", "train_dataset": str(info), "output_dir": str(folder / "out"),
        "peft_config": {"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all"},
        "optim_config": {"name": "ctr", "max_kl": 0.1}, "micro_batch_size": ROWS, "global_batch_size": ROWS,
        "cutoff_len": 128, "max_steps": steps, "bf16": False,
    }  # fmt: skip
    observer, original = Observer(), sft_trainer.SFTTrainer.compute_loss

    def compute_loss(self: Any, batch: Any) -> Tensor:
        kept = {k: batch[k].clone() for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
        labels = batch["labels"].clone()
        observer.saw(self.optimizer, lambda: predicted(self.model, kept, labels))
        loss = original(self, batch)
        observer.losses.append(float(loss))
        return loss

    sft_trainer.SFTTrainer.compute_loss = compute_loss
    try:
        sft_trainer.run_sft(config)
    finally:
        sft_trainer.SFTTrainer.compute_loss = original
    return observer


def swift(steps: int, folder: Path, **changes: str) -> Observer:
    """``swift sft --external_plugins ctr_plugin.py --optimizer ctr``."""
    from swift import sft_main

    data = write_rows(folder / "rows.jsonl", ROWS * steps * 2, as_messages)
    plugin = folder / "ctr_plugin.py"
    plugin.write_text("from ctr_optim.integrations.swift import register\n\nregister(max_kl=0.1)\n", encoding="utf-8")
    options = {
        "model": str(BASE), "model_type": "llama", "template": "dummy", "external_plugins": str(plugin),
        "optimizer": "ctr", "tuner_type": "lora", "lora_rank": "8", "lora_alpha": "16", "target_modules": "all-linear",
        "dataset": str(data), "max_steps": str(steps), "per_device_train_batch_size": str(ROWS),
        "torch_dtype": "float32",
        "gradient_accumulation_steps": "1", "max_length": "128", "output_dir": str(folder / "out"), "use_cpu": "true",
        "lr_scheduler_type": "constant", "warmup_ratio": "0", "save_strategy": "no", "split_dataset_ratio": "0",
        "attn_impl": "eager", "report_to": "none", "dataset_num_proc": "1", "dataloader_num_workers": "0",
        "use_hf": "true", **changes,
    }  # fmt: skip
    with observing_trainers() as observer:
        sft_main([text for name, value in options.items() for text in (f"--{name}", value)])
    return observer


def torchtune(steps: int, folder: Path) -> Observer:
    """torchtune's recipe for one device, set up from the YAML of the examples."""
    import torchtune as package
    from omegaconf import OmegaConf

    examples = ASSETS.parent / "torchtune"
    file = Path(package.__file__).parents[1] / "recipes" / "lora_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("lora_finetune_single_device", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    observer = Observer()

    class Recipe(module.LoRAFinetuneRecipeSingleDevice):  # type: ignore[name-defined, misc]
        """Takes note of every batch."""

        def _loss_step(self, batch: dict[str, Tensor]) -> Tensor:
            tokens, labels = batch["tokens"].clone(), batch["labels"].clone()

            def predict() -> Tensor:
                chunks = self._model(tokens)
                logits = chunks if isinstance(chunks, Tensor) else torch.cat(chunks, 1)
                return logits.float().log_softmax(-1)[:, :-1][labels[:, 1:] != self._loss_fn.ignore_index]

            observer.saw(self._optimizer, predict)
            loss: Tensor = super()._loss_step(batch)
            observer.losses.append(float(loss) / max(1, int((labels != self._loss_fn.ignore_index).sum())))
            return loss

    places = [f"output_dir={folder}", f"tokenizer.folder={BASE}", f"checkpointer.checkpoint_dir={BASE}",
              f"dataset.path={ROWS_FILE}", f"batch_size={ROWS}", "epochs=1", f"max_steps_per_epoch={steps}",
              "optimizer.rank_scheduler.total_steps=30"]  # fmt: skip
    config = OmegaConf.merge(OmegaConf.load(examples / "base5m.yaml"), OmegaConf.from_dotlist(places))
    sys.path.insert(0, str(examples))
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        recipe = Recipe(config)
        recipe.setup(config)
        recipe.train()
    finally:
        sys.path.remove(str(examples))
    return observer
