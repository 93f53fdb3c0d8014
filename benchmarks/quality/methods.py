"""The registry of methods: how each adapts a base model, and which optimizer trains it.

Peers are the real packages: PEFT for adapters, torch.optim, pytorch_optimizer and torch-optimizer for optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from ctr_optim import CTROptimizer


@dataclass
class Run:
    """A model ready to train; ``after_step(step)`` is called behind every optimizer step."""

    model: Any
    optimizer: Any
    after_step: Callable[[int], None] = lambda step: None


def _adapt(base, spec: dict, **config) -> Any:
    rank = spec["rank"]
    return get_peft_model(
        base, LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", **config})
    )


def _trainable(model) -> list:
    return [p for p in model.parameters() if p.requires_grad]


def _torch(name: str, **adapter) -> Callable:
    def build(base, spec: dict, batches) -> Run:
        model = _adapt(base, spec, **adapter)
        return Run(
            model, getattr(torch.optim, name)(_trainable(model), lr=spec["lr"], weight_decay=0.0, **spec["options"])
        )

    return build


def _ctr(base, spec: dict, batches) -> Run:
    options = deepcopy(spec["options"])
    start = options.pop("initialize", None)
    model = _adapt(base, spec)
    if start is not None:
        from ctr_optim import initialize

        initialize(model, [next(batches) for _ in range(start.pop("batches", 6))], **start)
    scheduler = options.get("rank_scheduler")
    if scheduler is not None:
        scheduler.setdefault("total_steps", spec["steps"])
    if spec["lr"] is not None:
        options["lr"] = spec["lr"]
    return Run(model, CTROptimizer(model.parameters(), **options))


def _lora_plus(base, spec: dict, batches) -> Run:
    from peft.optimizers import create_loraplus_optimizer

    model = _adapt(base, spec)
    return Run(
        model,
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=spec["lr"], loraplus_lr_ratio=16, weight_decay=0.0),
    )


def _pytorch_optimizer(name: str, **fixed) -> Callable:
    def build(base, spec: dict, batches) -> Run:
        import pytorch_optimizer

        model = _adapt(base, spec)
        return Run(model, getattr(pytorch_optimizer, name)(_trainable(model), lr=spec["lr"], **fixed))

    return build


def _torch_optimizer(name: str) -> Callable:
    def build(base, spec: dict, batches) -> Run:
        import torch_optimizer

        model = _adapt(base, spec)
        return Run(model, getattr(torch_optimizer, name)(_trainable(model), lr=spec["lr"]))

    return build


def _adalora(base, spec: dict, batches) -> Run:
    """AdaLoRA from PEFT: starts at 1.5 times the rank; alpha matched to that, as LoRA's is to its rank."""
    from peft import AdaLoraConfig

    rank, steps = spec["rank"], spec["steps"]
    start = max(2, round(1.5 * rank))
    config = AdaLoraConfig(
        init_r=start, target_r=rank, lora_alpha=2 * start, target_modules="all-linear",
        total_step=steps, tinit=steps // 10, tfinal=steps // 3, deltaT=5, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config)
    inner = model.base_model
    return Run(model, torch.optim.AdamW(_trainable(model), lr=spec["lr"], weight_decay=0.0),
               lambda step: inner.update_and_allocate(step))  # fmt: skip


def _eva(base, spec: dict, batches) -> Run:
    """EVA from PEFT: directions and ranks from the inputs' principal components."""
    from peft import EvaConfig, initialize_lora_eva_weights

    rank = spec["rank"]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)
    )
    model = get_peft_model(base, config, low_cpu_mem_usage=False)
    initialize_lora_eva_weights(model, [next(batches) for _ in range(6)], show_progress_bar=False)
    return Run(model, torch.optim.AdamW(_trainable(model), lr=spec["lr"], weight_decay=0.0))


METHODS: dict[str, Callable[[Any, dict, Any], Run]] = {
    "ctr": _ctr,
    "adamw": _torch("AdamW"),
    "rslora": _torch("AdamW", use_rslora=True),
    "dora": _torch("AdamW", use_dora=True),
    "pissa": _torch("AdamW", init_lora_weights="pissa"),
    "muon": _torch("Muon"),
    "lora_plus": _lora_plus,
    "adalora": _adalora,
    "eva": _eva,
    "soap": _pytorch_optimizer("SOAP", weight_decay=0.0),
    "lora_rite": _pytorch_optimizer("LoRARite"),
    "yogi": _torch_optimizer("Yogi"),
    "lamb": _torch_optimizer("Lamb"),
    "adabelief": _torch_optimizer("AdaBelief"),
}
