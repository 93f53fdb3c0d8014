"""Factors from first principles, and the optimizer's factors after one step."""

from __future__ import annotations

from typing import Any

from support import (
    Net,
    dense_factors,
    factors_of,
    llama_layers,
    llama_loss,
    lora_layers,
    loss_of,
    optimizer,
    peft_weights,
    plain_weights,
)
from torch import Tensor, nn

DENSE: dict[str, Any] = dict(factor_structure="dense", max_kl=None)


def oracle(model: Net, data: tuple[Tensor, Tensor]) -> dict[str, dict[str, Tensor]]:
    return dense_factors(model, lora_layers(model), plain_weights, lambda m: loss_of(m(data[0]), data[1]))


def llama_oracle(model: nn.Module, data: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return dense_factors(model, llama_layers(model), peft_weights, lambda m: llama_loss(m, data))


def llama_factors(
    model: nn.Module, *batches: dict[str, Tensor], reduction: str = "mean"
) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's factors after one step on these micro-batches."""
    opt = optimizer(model, loss_reduction=reduction, **DENSE)
    for data in batches:
        (llama_loss(model, data, reduction) / (len(batches) if reduction == "mean" else 1)).backward()
    opt.step()
    found = factors_of(opt)
    opt.close()
    return found
