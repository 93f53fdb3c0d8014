"""A PEFT adapter for readers that know one rank for all layers."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def export_uniform(model: Any, directory: str | os.PathLike[str], adapter: str = "default") -> int:
    """Save a PEFT model's adapter padded with zeros to its largest rank: one ``r``, one ``lora_alpha``, no patterns.

    The function is the same; the file is larger. Layers whose scaling differs from the first one's have the ratio
    folded into B.

    Args:
        model: a ``PeftModel`` with a LoRA adapter.
        directory: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        adapter: its name.

    Returns:
        the rank written.

    Raises:
        TypeError: if ``model`` is no PEFT model with that adapter.
    """
    if adapter not in getattr(model, "peft_config", {}):
        raise TypeError(f"export_uniform: got {type(model).__name__}, expected a PeftModel with an adapter {adapter!r}")
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter)
    scalings = _scalings(model, adapter)
    rank = max(w.shape[0] for k, w in weights.items() if k.endswith("lora_A.weight"))
    scaling = next(iter(scalings.values()))
    padded = {}
    for key, weight in weights.items():
        layer = key.partition(".lora_")[0]
        if key.endswith("lora_A.weight"):
            weight = torch.nn.functional.pad(weight, (0, 0, 0, rank - weight.shape[0]))
        elif key.endswith("lora_B.weight"):
            weight = torch.nn.functional.pad(weight * (scalings[layer] / scaling), (0, rank - weight.shape[1]))
        padded[key] = weight.detach().cpu().contiguous()
    config = copy.deepcopy(model.peft_config[adapter])
    config.r, config.lora_alpha, config.use_rslora = rank, scaling * rank, False
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.inference_mode = True
    Path(directory).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    save_file(padded, str(Path(directory) / "adapter_model.safetensors"), metadata={"format": "pt"})
    return rank


def _scalings(model: Any, adapter: str) -> dict[str, float]:
    """Scaling of every layer, by the layer's name in the saved weights."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "scaling", None), dict) and adapter in module.scaling:
            found[name] = float(module.scaling[adapter])
    return found
