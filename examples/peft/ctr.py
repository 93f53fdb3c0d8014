"""
This module contains the implementation of the CTR optimizer (curvature-aware, trust region).

Draft of ``src/peft/optimizers/ctr.py``.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch.optim import Optimizer


def create_ctr_optimizer(
    model: PeftModel, *, max_kl: float = 0.1, lr: float | None = None, weight_decay: float = 0.0, **kwargs: Any
) -> Optimizer:
    """
    Creates a CTR optimizer: Adam in the K-FAC eigenbasis of the LoRA layers, inside a trust region in nats per token.

    The trust region limits how far one step moves the model's predictions, so that no learning rate needs tuning.
    Requires `pip install ctr_optim`.

    Reference: https://huggingface.co/papers/2510.15962

    Args:
        model (`PeftModel`): The model to be optimized.
        max_kl (`float`):
            Bound on the predicted KL divergence per token of one step, in nats. Default value 0.1.
        lr (`float`, *optional*):
            The learning rate. Omit it: its size has no effect, because the bound sets the step length. A learning-rate
            schedule still scales the bound.
        weight_decay (`float`):
            Decoupled weight decay, as in AdamW. Default value 0.0.
        kwargs (`dict`): Additional keyword arguments to be passed to `ctr_optim.CTROptimizer`.

    Returns:
        `torch.optim.Optimizer`: An instance of `ctr_optim.CTROptimizer` with the model's trainable parameters.
    """
    try:
        from ctr_optim import CTROptimizer
    except ImportError as exc:
        raise ImportError("create_ctr_optimizer needs ctr_optim: pip install ctr_optim") from exc

    params = [param for param in model.parameters() if param.requires_grad]
    if not params:
        raise ValueError("The model has no trainable parameters; was the adapter loaded with is_trainable=True?")
    return CTROptimizer(params, lr=lr, weight_decay=weight_decay, max_kl=max_kl, model=model, **kwargs)
