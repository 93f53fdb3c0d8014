"""Frameworks whose entry point wants a GPU: their own layers, losses and builders, called as they call them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.trust.framework_cases import BASE, ROWS, Observer, predicted, rows
from ctr_optim.optimizer import CTROptimizer


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


def train_plain(model: nn.Module, optimizer: Any, steps: int, engine: Any = None) -> Observer:
    """Train on the E2E rows in a plain loop, or with DeepSpeed's ``engine`` around the model and the optimizer."""
    observer = Observer()
    for batch in plain_batches(steps):
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        observer.saw(optimizer, lambda inputs=inputs, labels=labels: predicted(model, inputs, labels))
        loss = (engine or model)(**batch).loss
        if engine is None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            engine.backward(loss)
            engine.step()
        observer.losses.append(loss.item())
    return observer


def deepspeed(steps: int, folder: Path) -> Observer:
    """DeepSpeed's engine at stage 0 in float32, the one that leaves parameters where they are."""
    import deepspeed as package

    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29641",
    }
    model = adapted_base()
    optimizer = CTROptimizer([p for p in model.parameters() if p.requires_grad])
    config = {"train_micro_batch_size_per_gpu": ROWS, "zero_optimization": {"stage": 0},
              "zero_allow_untested_optimizer": True}  # fmt: skip
    engine, *_ = package.initialize(model=model, optimizer=optimizer, config=config)
    return train_plain(model, optimizer, steps, engine)
