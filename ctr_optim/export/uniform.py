"""Save a PEFT adapter with one rank for all layers, for programs that support only one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ctr_optim.export.adapter import adapter_of, half_of, write, zero_padded
from ctr_optim.export.files import CONFIG, WEIGHTS, read_adapter


def export_uniform(model: Any, directory: str | os.PathLike[str], adapter: str = "default") -> int:
    """Save a PEFT model's adapter, zero-padded to its largest rank: one ``r``, one ``lora_alpha``, no patterns.

    The saved adapter gives the same outputs, in a larger file. If a layer's scaling differs from the first layer's, B
    is multiplied by the ratio.

    Args:
        model: a ``PeftModel`` with a LoRA adapter.
        directory: directory to write, with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter: the adapter's name (default: "default").

    Returns:
        The written rank.

    Raises:
        TypeError: ``model`` is not a PEFT model with this adapter.
    """
    weights, scalings, config = adapter_of(model, adapter, "export_uniform")
    padded, rank, scaling = pad(weights, scalings)
    config.r, config.lora_alpha, config.use_rslora = rank, scaling * rank, False
    config.rank_pattern, config.alpha_pattern = {}, {}
    write(config, padded, directory)
    return rank


def export_uniform_files(source: str | os.PathLike[str], directory: str | os.PathLike[str]) -> int:
    """Apply :func:`export_uniform` to an adapter that PEFT saved in ``source``. Needs neither the model nor PEFT.

    Raises:
        FileNotFoundError: an adapter file is missing in ``source``.
        ValueError: the adapter is not LoRA, a file is damaged, or ``directory`` is ``source``.
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
    """Zero-pad weights to their largest rank, and bring them to one scaling.

    Args:
        weights: weights by PEFT's saved names.
        scalings: scaling by layer name in ``weights``.

    Returns:
        The padded weights, the rank and the scaling.
    """
    rank = max(w.shape[0] for k, w in weights.items() if half_of(k) == "A")
    scaling = next(iter(scalings.values()))
    padded = {}
    for key, weight in weights.items():
        layer = key.partition(".lora_")[0]
        if half_of(key) == "A":
            weight = zero_padded(weight, rank, 0)
        elif half_of(key) == "B":
            weight = zero_padded(weight * (scalings[layer] / scaling), rank, 1)
        padded[key] = weight.detach().cpu().contiguous()
    return padded, rank, scaling
