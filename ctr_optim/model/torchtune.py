"""LoRA layers of torchtune and torchtitan: ``LoRALinear`` with submodules ``lora_a`` and ``lora_b``.

torchtune computes ``s = alpha / rank`` in every forward pass; torchtitan stores ``s`` as ``_lora_scaling``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ctr_optim.model.pair import LoRAPair


class TorchtuneLibrary:
    """The :class:`~ctr_optim.model.pair.Library` of torchtune's layers: attributes ``rank`` and ``alpha``."""

    def scaling(self, pair: LoRAPair) -> float:
        layer: Any = pair.layer
        return float(layer.alpha) / float(layer.rank)

    def rank_changed(self, pair: LoRAPair, old_scaling: float) -> None:
        layer: Any = pair.layer
        pair.down.out_features = pair.rank  # type: ignore[assignment]
        pair.up.in_features = pair.rank  # type: ignore[assignment]
        layer.rank = pair.rank
        layer.alpha = old_scaling * pair.rank


class TorchtitanLibrary:
    """The :class:`~ctr_optim.model.pair.Library` of torchtitan's layers, which store neither rank nor alpha."""

    def scaling(self, pair: LoRAPair) -> float:
        layer: Any = pair.layer
        return float(layer._lora_scaling)

    def rank_changed(self, pair: LoRAPair, old_scaling: float) -> None:
        pair.down.out_features = pair.rank  # type: ignore[assignment]
        pair.up.in_features = pair.rank  # type: ignore[assignment]


_TORCHTUNE, _TORCHTITAN = TorchtuneLibrary(), TorchtitanLibrary()


def find(root: nn.Module) -> Iterator[LoRAPair]:
    """Yield the pairs of every torchtune or torchtitan LoRA layer below ``root``."""
    for name, module in root.named_modules():
        down, up = module._modules.get("lora_a"), module._modules.get("lora_b")
        if not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear)):
            continue
        if hasattr(module, "_lora_scaling"):
            yield LoRAPair(name, down, up, module, None, _TORCHTITAN)
        elif hasattr(module, "alpha") and hasattr(module, "rank"):
            yield LoRAPair(name, down, up, module, None, _TORCHTUNE)
