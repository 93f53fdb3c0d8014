"""torchtune: ``LoRALinear`` with ``lora_a``/``lora_b`` and ``s = alpha / rank`` recomputed in every forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ctr_optim.model.pair import LoRAPair


class TorchtuneLibrary:
    """Bookkeeping of torchtune-style layers: ``rank`` and ``alpha`` attributes."""

    def scaling(self, pair: LoRAPair) -> float:
        layer: Any = pair.layer
        return float(layer.alpha) / float(layer.rank)

    def rank_changed(self, pair: LoRAPair, old_scaling: float) -> None:
        layer: Any = pair.layer
        pair.down.out_features = pair.rank  # type: ignore[assignment]
        pair.up.in_features = pair.rank  # type: ignore[assignment]
        layer.rank = pair.rank
        layer.alpha = old_scaling * pair.rank


_LIBRARY = TorchtuneLibrary()


def find(root: nn.Module) -> Iterator[LoRAPair]:
    """Pairs of every torchtune LoRA layer below ``root``."""
    for name, module in root.named_modules():
        down, up = module._modules.get("lora_a"), module._modules.get("lora_b")
        if (
            isinstance(down, nn.Linear)
            and isinstance(up, nn.Linear)
            and hasattr(module, "alpha")
            and hasattr(module, "rank")
        ):
            yield LoRAPair(name, down, up, module, None, _LIBRARY)
