"""PEFT adapters on disk, read without the model that they belong to."""

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
    """One layer of a saved adapter: A ``(r, d_in)``, B ``(d_out, r)`` and the scaling s."""

    name: str
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def parameters(self) -> int:
        """Of A and B together."""
        return self.a.numel() + self.b.numel()

    @property
    def norm(self) -> float:
        """The Frobenius norm of ``s B A``, from r x r matrices."""
        a, b = self.a.double(), self.b.double()
        square = ((b.mT @ b) * (a @ a.mT)).sum()
        return abs(self.scaling) * math.sqrt(max(float(square), 0.0))


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's config and weights, by their names in the files."""

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    def scaling(self, layer: str, rank: int) -> float:
        """The factor s that PEFT gives a layer (``base_model.model.``... or bare name) of ``rank``."""
        alpha = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", prefix_free(layer)):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def scalings(self) -> dict[str, float]:
        """Scaling of every layer, by its name in the weights."""
        ends = (".lora_A.weight", ".lora_embedding_A")
        return {
            layer: self.scaling(layer, weight.shape[0])
            for key, weight in self.weights.items()
            for layer, end in ((key.removesuffix(end), end) for end in ends)
            if key.endswith(end)
        }

    @property
    def layers(self) -> list[SavedLayer]:
        """Every layer with two linear halves, in the order of the file."""
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
    """A layer's name in its base model, from its name in the weights."""
    return layer.removeprefix(_PREFIX)


def read_adapter(directory: str | os.PathLike[str]) -> SavedAdapter:
    """Read a LoRA adapter that PEFT saved.

    Raises:
        FileNotFoundError: no ``adapter_config.json`` or ``adapter_model.safetensors`` there.
        ValueError: it is not LoRA, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (Path(directory) / name).is_file():
            raise FileNotFoundError(f"{directory}: no {name} in it; expected what PEFT's save_pretrained wrote")
    try:
        config = json.loads((Path(directory) / CONFIG).read_text(encoding="utf-8"))
        if config.get("peft_type") != "LORA":
            raise ValueError(f"{directory}: its peft_type is {config.get('peft_type')!r}, expected 'LORA'")
        return SavedAdapter(config, load_file(Path(directory) / WEIGHTS))
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{directory}: damaged, or not written to the end ({error}); save the adapter again") from None
