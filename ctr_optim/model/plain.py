"""Hand-written LoRA layers: modules with linear submodules ``lora_A`` and ``lora_B``, and an optional ``scaling``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ctr_optim.model.pair import LoRAPair


class PlainLibrary:
    """The :class:`~ctr_optim.model.pair.Library` of plain layers: optional ``scaling``, ``r`` and ``rank``."""

    def scaling(self, pair: LoRAPair) -> float:
        return float(getattr(pair.layer, "scaling", 1.0))  # type: ignore[arg-type]

    def rank_changed(self, pair: LoRAPair, old_scaling: float) -> None:
        layer: Any = pair.layer
        pair.down.out_features = pair.rank  # type: ignore[assignment]
        pair.up.in_features = pair.rank  # type: ignore[assignment]
        for attribute in ("r", "rank"):
            if isinstance(getattr(layer, attribute, None), int):
                setattr(layer, attribute, pair.rank)
        if isinstance(vars(layer).get("scaling"), (int, float)):
            layer.scaling = old_scaling


_LIBRARY = PlainLibrary()


def find(root: nn.Module) -> Iterator[LoRAPair]:
    """Yield the pairs of every plain LoRA layer below ``root``."""
    for name, module in root.named_modules():
        down, up = module._modules.get("lora_A"), module._modules.get("lora_B")
        if isinstance(down, nn.Linear) and isinstance(up, nn.Linear):
            yield LoRAPair(name, down, up, module, None, _LIBRARY)
