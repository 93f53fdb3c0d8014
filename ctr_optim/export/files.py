"""Read saved PEFT adapters without their base model."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class SavedLayer:
    """One layer of a saved adapter.

    Attributes:
        name: the layer's name in the base model.
        a: A ``(r, d_in)``.
        b: B ``(d_out, r)``.
        scaling: the factor s of ``s B A``.
    """

    name: str
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rank r, the number of rows of A."""
        return self.a.shape[0]

    @property
    def parameters(self) -> int:
        """Number of parameters in A and B."""
        return self.a.numel() + self.b.numel()

    @property
    def norm(self) -> float:
        """Frobenius norm of ``s B A``, computed from r x r matrices."""
        a, b = self.a.double(), self.b.double()
        square = ((b.mT @ b) * (a @ a.mT)).sum()
        return abs(self.scaling) * math.sqrt(max(float(square), 0.0))


@dataclass(frozen=True)
class SavedAdapter:
    """Config and weights of an adapter, by their names in the files."""

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    def scaling(self, layer: str, rank: int) -> float:
        """Return the factor s that PEFT computes for a layer of the given rank.

        Args:
            layer: name of the layer, with or without the prefix ``base_model.model.``.
            rank: rank of the layer.
        """
        alpha = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", prefix_free(layer)):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def scalings(self) -> dict[str, float]:
        """Scaling by layer name in the weights."""
        ends = (".lora_A.weight", ".lora_embedding_A")
        return {
            layer: self.scaling(layer, weight.shape[0])
            for key, weight in self.weights.items()
            for layer, end in ((key.removesuffix(end), end) for end in ends)
            if key.endswith(end)
        }

    @property
    def layers(self) -> list[SavedLayer]:
        """All layers whose A and B are matrices, in the order of the file."""
        return [
            SavedLayer(
                prefix_free(name),
                self.weights[f"{name}.lora_A.weight"],
                self.weights[f"{name}.lora_B.weight"],
                scaling,
            )
            for name, scaling in self.scalings.items()
            if self.weights.get(f"{name}.lora_A.weight", torch.empty(0, device="cpu")).dim() == 2
        ]


def prefix_free(layer: str) -> str:
    """Return a layer's name in the base model, given its name in the weights."""
    return layer.removeprefix(_PREFIX)


def read_adapter(directory: str | os.PathLike[str]) -> SavedAdapter:
    """Read a LoRA adapter that PEFT saved in ``directory``.

    Raises:
        FileNotFoundError: ``adapter_config.json`` or ``adapter_model.safetensors`` is missing.
        ValueError: the adapter is not LoRA, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (Path(directory) / name).is_file():
            raise FileNotFoundError(
                f"{directory}: found no {name}; expected a directory that PEFT's save_pretrained wrote"
            )
    try:
        config = json.loads((Path(directory) / CONFIG).read_text(encoding="utf-8"))
        if config.get("peft_type") != "LORA":
            raise ValueError(
                f"{directory}: the config's peft_type is {config.get('peft_type')!r}, expected 'LORA'; pass a LoRA "
                "adapter"
            )
        return SavedAdapter(config, load_file(Path(directory) / WEIGHTS))
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{directory}: damaged or incomplete ({error}); save the adapter again") from None
