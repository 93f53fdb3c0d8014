"""A PEFT adapter for readers that know one rank for all layers."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctr_optim.adapters.files import CONFIG, WEIGHTS, read_adapter


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
    padded, rank, scaling = pad(weights, _scalings(model, adapter))
    config = copy.deepcopy(model.peft_config[adapter])
    config.r, config.lora_alpha, config.use_rslora = rank, scaling * rank, False
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.inference_mode = True
    Path(directory).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    save_file(padded, str(Path(directory) / WEIGHTS), metadata={"format": "pt"})
    return rank


def export_uniform_files(source: str | os.PathLike[str], directory: str | os.PathLike[str]) -> int:
    """:func:`export_uniform` of an adapter that PEFT saved in ``source``; needs neither the model nor PEFT.

    Raises:
        FileNotFoundError, ValueError: if there is no LoRA adapter in ``source``, or it is ``directory`` itself.
    """
    from safetensors.torch import save_file

    if Path(source).resolve() == Path(directory).resolve():
        raise ValueError(f"export_uniform: {directory} is the adapter itself; write to another directory")
    saved = read_adapter(source)
    padded, rank, scaling = pad(saved.weights, saved.scalings)
    plain = {"r": rank, "lora_alpha": scaling * rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    Path(directory).mkdir(parents=True, exist_ok=True)
    config = json.dumps({**saved.config, **plain}, indent=2, sort_keys=True)
    (Path(directory) / CONFIG).write_text(config + "\n", encoding="utf-8")
    save_file(padded, Path(directory) / WEIGHTS, metadata={"format": "pt"})
    return rank


def pad(weights: Mapping[str, Tensor], scalings: Mapping[str, float]) -> tuple[dict[str, Tensor], int, float]:
    """Weights padded with zeros to their largest rank and one scaling; and these two.

    Args:
        weights: as PEFT saves them.
        scalings: of every layer, by its name in ``weights``.
    """
    rank = max(w.shape[0] for k, w in weights.items() if _half(k) == "A")
    scaling = next(iter(scalings.values()))
    padded = {}
    for key, weight in weights.items():
        layer = key.partition(".lora_")[0]
        if _half(key) == "A":
            weight = _padded(weight, rank, 0)
        elif _half(key) == "B":
            weight = _padded(weight * (scalings[layer] / scaling), rank, 1)
        padded[key] = weight.detach().cpu().contiguous()
    return padded, rank, scaling


def _half(key: str) -> str | None:
    """``"A"`` or ``"B"``, of a linear, convolutional or embedding layer."""
    found = re.search(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$", key)
    return found and found[1]


def _padded(weight: Tensor, size: int, dim: int) -> Tensor:
    """With zeros at the end of ``dim``."""
    shape = list(weight.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([weight, weight.new_zeros(shape)], dim)


def _scalings(model: Any, adapter: str) -> dict[str, float]:
    """Scaling of every layer, by the layer's name in the saved weights."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "scaling", None), dict) and adapter in module.scaling:
            found[name] = float(module.scaling[adapter])
    return found
