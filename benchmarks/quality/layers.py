"""The LoRA layers of a PEFT model, as pairs of modules."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.lora import LoraLayer
from torch import nn


def lora_layers(model: nn.Module, adapter: str = "default") -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield the modules of A, weight ``(r, d_in)``, and B, weight ``(d_out, r)``, of every adapted linear layer."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield module.lora_A[adapter], module.lora_B[adapter]
