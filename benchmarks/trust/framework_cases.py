"""Frameworks that are driven through their own entry point, on the base of the examples; each returns what it measured.

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
    return {
        "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["target"]}]
    }


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
        "tf32": False, "flash_attention": False, "attn_implementation": "eager", "sample_packing": False, "dataset_num_proc": 1,
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
        sft_trainer.run_sft(
            {
                "model": str(BASE), "template": "chatml", "train_dataset": str(info), "output_dir": str(folder / "out"),
                "peft_config": {"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all"},
                "optim_config": {"name": "ctr", "max_kl": 0.1}, "micro_batch_size": ROWS, "global_batch_size": ROWS,
                "cutoff_len": 128, "max_steps": steps, "bf16": False,
            }  # fmt: skip
        )
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
        "dataset": str(data), "max_steps": str(steps), "per_device_train_batch_size": str(ROWS), "torch_dtype": "float32",
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


def nemo(steps: int, folder: Path, fused: bool = True) -> Observer:
    """NeMo Automodel's parts: its LoRA layers, its loss, and its optimizer builder with ``_target_``.

    The recipe itself wants CUDA. ``fused``: ``use_memory_efficient_lora``, the default, whose autograd functions read
    the weights of A and B and never call the modules.
    """
    sys.modules["triton"] = None  # type: ignore[assignment] -- its kernels name a key that triton 3.9 refuses
    from nemo_automodel.components._peft.lora import PeftConfig, apply_lora_to_linear_modules
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
    from nemo_automodel.components.optim.optimizer import build_optimizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    peft = PeftConfig(match_all_linear=True, dim=8, alpha=32, use_memory_efficient_lora=fused)
    apply_lora_to_linear_modules(model, peft)
    [optimizer] = build_optimizer(model, ("ctr_optim.CTROptimizer", {"max_kl": 0.1}))
    loss_of, observer = MaskedCrossEntropy(), Observer()
    for batch in plain_batches(steps):
        labels = batch.pop("labels")
        ahead = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # its datasets shift the labels
        observer.saw(optimizer, lambda batch=batch, labels=labels: predicted(model, batch, labels))
        loss = loss_of(model(**batch).logits, ahead, num_label_tokens=int((ahead != -100).sum()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        observer.losses.append(float(loss))
    return observer


def plain_batches(steps: int) -> Iterator[dict[str, Tensor]]:
    """``input_ids``, ``attention_mask`` and ``labels`` of the E2E rows."""
    from transformers import AutoTokenizer

    from examples.common import collate, encode

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    examples = encode(rows(ROWS * steps), tokenizer, 128)
    for step in range(steps):
        yield collate(examples[step * ROWS : (step + 1) * ROWS], tokenizer.pad_token_id, torch.device("cpu"))


def torchtitan(steps: int, folder: Path, chunked: bool = False) -> Observer:
    """torchtitan's small Llama 3 with its LoRA, our container, its schedule and its losses, as its Trainer calls them.

    Args:
        chunked: ``ChunkedLossWrapper``, which takes the last layer out of the forward.
    """
    from torchtitan.components.lora import LoRAConverter
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig
    from torchtitan.models.common.attention import FlexAttention
    from torchtitan.models.llama3 import model_registry

    from ctr_optim.integrations.torchtitan import CTROptimizersContainer

    def dense(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, **_: Any) -> Any:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True), None

    FlexAttention._compiled_flex_attn = staticmethod(dense)  # FlexAttention has no backward on the CPU
    torch.manual_seed(0)
    lora = LoRAConverter.Config(rank=8, alpha=16.0, target_modules=["wqkv", "wo"])
    config = model_registry("debugmodel", attn_backend="flex", converters=[lora]).model
    config.layers = config.layers[:2]
    model = config.build()
    model.init_weights(buffer_device=torch.device("cpu"))
    nn.init.normal_(model.lm_head.weight, std=0.3)
    groups = [ParamGroupConfig(pattern=".*", optimizer_name="CTR", optimizer_kwargs={"max_kl": 0.1})]
    container = CTROptimizersContainer.Config(param_groups=groups).build(model_parts=[model])
    schedule = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=container, training_steps=steps)
    loss_config: Any = CrossEntropyLoss.Config(global_vocab_size=2048)
    loss_fn = (ChunkedLossWrapper.Config(loss_fn=loss_config, num_chunks=4) if chunked else loss_config).build()
    if chunked:
        loss_fn.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    observer, positions = Observer(), torch.arange(32).expand(ROWS, 32).contiguous()
    for step in range(steps):
        ids = sequences_of_a_rule(step)
        labels = ids[:, 1:].masked_fill(torch.arange(32) < 4, -100)
        inputs = {"positions": positions, "attention_masks": model.get_attention_masks(positions)}

        def predict(ids: Tensor = ids, labels: Tensor = labels, inputs: dict[str, Any] = inputs) -> Tensor:
            model._skip_lm_head = False
            found = model(ids[:, :-1], **inputs).float().log_softmax(-1)[labels != -100]
            model._skip_lm_head = chunked
            return found

        observer.saw(container.optimizers[0], predict)
        container.zero_grad(set_to_none=False)
        loss, _ = loss_fn(model(ids[:, :-1], **inputs), labels, (labels != -100).sum())
        loss.backward()
        container.step()
        schedule.step()
        observer.losses.append(loss.item())
    return observer


def sequences_of_a_rule(step: int) -> Tensor:
    """``(ROWS, 33)`` tokens below 200; four of five follow the rule ``5 x + 3``."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 200, (ROWS, 33), generator=generator)
    chance = torch.rand(ROWS, 33, generator=generator)
    for t in range(1, 33):
        ids[:, t] = torch.where(chance[:, t] < 0.8, (5 * ids[:, t - 1] + 3) % 200, ids[:, t])
    return ids


def adapted_base() -> Any:
    """The base of the examples with PEFT's LoRA on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def unsloth(steps: int, folder: Path) -> Observer:
    """Unsloth's autograd functions for q, k, v and o, which read the weights of A and B, in PEFT's model."""
    os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
    from unsloth.kernels.fast_lora import LoRA_W, get_lora_parameters

    model = adapted_base()
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):

            def forward(x: Tensor, layer: Any = module) -> Tensor:
                return LoRA_W.apply(x, *get_lora_parameters(layer))

            module.forward = forward
    return train_plain(model, CTROptimizer([p for p in model.parameters() if p.requires_grad]), steps)


def train_plain(model: nn.Module, optimizer: Any, steps: int) -> Observer:
    """A plain loop over the E2E rows."""
    observer = Observer()
    for batch in plain_batches(steps):
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        observer.saw(optimizer, lambda inputs=inputs, labels=labels: predicted(model, inputs, labels))
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        observer.losses.append(loss.item())
    return observer


def deepspeed(steps: int, folder: Path) -> Observer:
    """DeepSpeed's engine at stage 0 in float32, the one that leaves parameters where they are."""
    import deepspeed as package

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29641"}
    model = adapted_base()
    optimizer = CTROptimizer([p for p in model.parameters() if p.requires_grad])
    config = {"train_micro_batch_size_per_gpu": ROWS, "zero_optimization": {"stage": 0},
              "zero_allow_untested_optimizer": True}  # fmt: skip
    engine, *_ = package.initialize(model=model, optimizer=optimizer, config=config)
    observer = Observer()
    for batch in plain_batches(steps):
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        observer.saw(optimizer, lambda inputs=inputs, labels=labels: predicted(model, inputs, labels))
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        observer.losses.append(loss.item())
    return observer
