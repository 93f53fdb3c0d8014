"""Integrations with training frameworks; each module imports one framework."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ctr_optim.checkpoint.matching import resize_on_load
from ctr_optim.model.registry import find_pairs
from ctr_optim.optimizer import CTROptimizer


def unwrap(optimizer: Any) -> CTROptimizer:
    """Return the CTROptimizer inside a framework's wrapper (Accelerate's or Lightning's).

    Raises:
        TypeError: the wrapper contains no CTROptimizer.
    """
    inner = optimizer
    while not isinstance(inner, CTROptimizer):
        if not hasattr(inner, "optimizer"):
            raise TypeError(f"expected a CTROptimizer, got {type(optimizer).__name__}; pass one to the trainer")
        inner = inner.optimizer
    return inner


def check_ownership(optimizer: CTROptimizer, model: nn.Module) -> None:
    """Check that the optimizer owns at least one trainable parameter of the model.

    Raises:
        ValueError: no trainable parameter of ``model`` is in a parameter group, so the model would not train.
    """
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    owned = sum(1 for p in model.parameters() if p.requires_grad and id(p) in ours)
    if names and not owned:
        raise ValueError(
            f"CTROptimizer: owns none of the {len(names)} parameters that the model trains ({names[0]}, ...), so the "
            "model would not train. The trainer added an adapter (peft_config=...) or copied the model after the "
            "optimizer was built. Leave out optimizers=, and call "
            "ctr_optim.integrations.transformers.attach(trainer, ...) on the finished trainer. Or call "
            "peft.get_peft_model first, build CTROptimizer from the result, and leave out peft_config="
        )


def accept_ranks(model: nn.Module) -> list[Any]:
    """Register hooks that let ``model`` load LoRA weights of any rank, and return the hooks.

    Trainers that load a checkpoint before they build the optimizer need these hooks.
    """
    return [hook for pair in find_pairs(model) for hook in resize_on_load(pair)]


def set_length(optimizer: CTROptimizer, total_steps: int) -> None:
    """Set the rank scheduler's ``total_steps`` if it is None."""
    scheduler = optimizer.rank_scheduler
    if scheduler is not None and scheduler.total_steps is None and total_steps > 0:
        optimizer.rank_scheduler = replace(scheduler, total_steps=total_steps)
