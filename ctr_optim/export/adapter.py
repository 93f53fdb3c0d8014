"""Read and write a PEFT model's adapter in PEFT's file format."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctr_optim.export.files import WEIGHTS
from ctr_optim.runtime.distributed import is_first, whole


def adapter_of(model: Any, adapter: str, who: str) -> tuple[dict[str, Tensor], dict[str, float], Any]:
    """Return an adapter's weights by PEFT's saved names, the scaling of each layer, and a copy of the config.

    Args:
        model: a ``PeftModel``.
        adapter: the adapter's name.
        who: the caller's name, for error messages.

    Raises:
        TypeError: ``model`` is not a PEFT model with this adapter.
    """
    if adapter not in getattr(model, "peft_config", {}):
        raise TypeError(f"{who}: got {type(model).__name__}, expected a PeftModel with an adapter {adapter!r}")
    from peft import get_peft_model_state_dict

    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    weights = {key: whole(w) for key, w in get_peft_model_state_dict(model, adapter_name=adapter).items()}
    return weights, _scalings(model, adapter), config


def write(config: Any, weights: Mapping[str, Tensor], directory: str | os.PathLike[str]) -> None:
    """Write the same files as PEFT's ``save_pretrained``; only the first process writes."""
    from safetensors.torch import save_file

    if not is_first():
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    save_file(dict(weights), str(Path(directory) / WEIGHTS), metadata={"format": "pt"})


def half_of(key: str) -> str | None:
    """Return ``"A"`` or ``"B"`` for a key of a linear, convolutional or embedding LoRA layer, else None."""
    found = re.search(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$", key)
    return found and found[1]


def zero_padded(weight: Tensor, size: int, dim: int) -> Tensor:
    """Return the weight with zeros appended along ``dim``, up to ``size``."""
    shape = list(weight.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([weight, weight.new_zeros(shape)], dim)


def _scalings(model: Any, adapter: str) -> dict[str, float]:
    """Return the scaling of every layer, by the layer's name in the saved weights."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "scaling", None), dict) and adapter in module.scaling:
            found[name] = float(module.scaling[adapter])
    return found
