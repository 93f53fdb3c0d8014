"""LoRA layers of Hugging Face PEFT: ``LoraLayer`` keeps ``lora_A`` and ``lora_B`` in ModuleDicts, by adapter.

This code also handles rsLoRA (only the meaning of ``lora_alpha`` changes) and DoRA (its magnitude has no rank
dimension). It reads only the adapter's own linear modules, so the base layer may be quantised.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from ctr_optim.model.pair import LoRAPair

_PREFIX = re.compile(r"^(?:.*\.)?base_model\.model\.")


class PeftLibrary:
    """The :class:`~ctr_optim.model.pair.Library` of one PEFT model: layer attributes and the adapters' configs.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._configs = [m for m in root.modules() if isinstance(getattr(m, "peft_config", None), dict)]
        self.layers: list[tuple[str, nn.Module]] = []  # all LoRA layers, also those whose rank cannot change
        self._written: list[tuple[Any, Any]] = []  # rank and alpha patterns that this object wrote

    def scaling(self, pair: LoRAPair) -> float:
        return float(pair.layer.scaling[pair.adapter])  # type: ignore[index,operator]

    def rank_changed(self, pair: LoRAPair, old_scaling: float) -> None:
        layer: Any = pair.layer
        adapter, rank = pair.adapter, pair.rank
        config = self._config(adapter)
        pair.down.out_features = rank  # type: ignore[assignment]
        pair.up.in_features = rank  # type: ignore[assignment]
        layer.r[adapter] = rank
        layer.scaling[adapter] = old_scaling
        layer.lora_alpha[adapter] = old_scaling * (math.sqrt(rank) if getattr(config, "use_rslora", False) else rank)
        if config is not None:
            self._write_patterns(config, adapter)
            self._name(config, _exactly(pair.name), rank, layer.lora_alpha[adapter])

    def tidy(self, adapter: str) -> None:
        """Set the config's rank and alpha to the most frequent ones; its patterns then list only the other layers."""
        config = self._config(adapter)
        if config is None or not self.layers:
            return
        pairs = [(layer.r[adapter], layer.lora_alpha[adapter]) for _, layer in self.layers if adapter in layer.r]  # type: ignore
        config.r, config.lora_alpha = Counter(pairs).most_common(1)[0][0]
        self._written.clear()
        self._write_patterns(config, adapter)

    def _config(self, adapter: str | None) -> Any:
        return next((m.peft_config[adapter] for m in self._configs if adapter in m.peft_config), None)  # type: ignore

    def _write_patterns(self, config: Any, adapter: str | None) -> None:
        """Replace the config's patterns by one exact entry for each layer that differs from the config.

        PEFT uses the first matching key and may sort the keys, so a broader pattern of the user could match before an
        exact entry. This method therefore rewrites both dicts at the first rank change.
        """
        if any(config.rank_pattern is ranks and config.alpha_pattern is alphas for ranks, alphas in self._written):
            return
        mine: dict[str, Any] = {_exactly(name): layer for name, layer in self.layers if adapter in layer.r}  # type: ignore
        config.rank_pattern, config.alpha_pattern = {}, {}
        for key, layer in mine.items():
            self._name(config, key, layer.r[adapter], layer.lora_alpha[adapter])
        self._written.append((config.rank_pattern, config.alpha_pattern))

    @staticmethod
    def _name(config: Any, key: str, rank: int, alpha: float) -> None:
        """Add one layer to the patterns, or remove it if it has the config's own rank or alpha."""
        for pattern, value, usual in (
            (config.rank_pattern, rank, config.r),
            (config.alpha_pattern, alpha, config.lora_alpha),
        ):
            if value == usual:
                pattern.pop(key, None)
            else:
                pattern[key] = value


def _exactly(name: str) -> str:
    """Return the pattern that matches one layer."""
    return "^" + re.escape(name)


def find(root: nn.Module) -> Iterator[LoRAPair]:
    """Yield the pairs of every PEFT LoRA layer below ``root``, one for each adapter whose A and B are ``nn.Linear``."""
    library = PeftLibrary(root)
    pairs = []
    for name, module in root.named_modules():
        downs, ups = module._modules.get("lora_A"), module._modules.get("lora_B")
        if not (isinstance(downs, nn.ModuleDict) and isinstance(ups, nn.ModuleDict)):
            continue
        if type(module).__name__ == "ParamWrapper":  # never calls A and B as modules, so hooks see nothing
            continue
        plain_name = _PREFIX.sub("", name)
        if isinstance(getattr(module, "r", None), dict) and isinstance(getattr(module, "lora_alpha", None), dict):
            library.layers.append((plain_name, module))
        for adapter, down in downs.items():
            up = ups._modules.get(adapter)
            if isinstance(down, nn.Linear) and isinstance(up, nn.Linear):
                pairs.append(LoRAPair(plain_name, down, up, module, adapter, library))
    yield from pairs
