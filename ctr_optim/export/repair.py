"""Adapters saved by libraries that write one rank for all layers."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ctr_optim.export.files import CONFIG, prefix_free, read_adapter


def fix_torchtune_adapter(directory: str | os.PathLike[str]) -> dict[str, int]:
    """Write the ranks that the layers have into the ``adapter_config.json`` that torchtune saved.

    torchtune writes the rank and alpha that the run began with. Ranks that moved are read from the weights; every layer
    keeps the scaling ``alpha / rank``. Calling it twice does no harm.

    Args:
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        the rank of every layer.

    Raises:
        FileNotFoundError, ValueError: if there is no LoRA adapter, or none with one scaling for all layers.
    """
    saved = read_adapter(directory)
    config = dict(saved.config)
    if config.get("use_rslora"):
        raise ValueError(f"{directory}: its config sets use_rslora, which torchtune never does; it needs no repair")
    scaling = float(config["lora_alpha"]) / int(config["r"])
    ranks = {prefix_free(layer): saved.weights[f"{layer}.lora_A.weight"].shape[0] for layer in saved.scalings}
    if not ranks:
        raise ValueError(f"{directory}: its weights hold no LoRA layers")
    config["rank_pattern"] = {"^" + re.escape(name): rank for name, rank in ranks.items()}
    config["alpha_pattern"] = {"^" + re.escape(name): scaling * rank for name, rank in ranks.items()}
    (Path(directory) / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return ranks
