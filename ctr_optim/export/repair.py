"""Repair adapter configs of libraries that write one rank for all layers."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ctr_optim.export.files import CONFIG, prefix_free, read_adapter


def fix_torchtune_adapter(directory: str | os.PathLike[str]) -> dict[str, int]:
    """Write the ranks of all layers into the ``adapter_config.json`` that torchtune saved.

    torchtune writes the rank and alpha of the start of training. This function reads the current ranks from the
    weights, and keeps the scaling ``alpha / rank`` of every layer. A second call changes nothing.

    Args:
        directory: directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        Rank by layer name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the adapter is not LoRA, has no LoRA layers, or uses rsLoRA.
    """
    saved = read_adapter(directory)
    config = dict(saved.config)
    if config.get("use_rslora"):
        raise ValueError(
            f"{directory}: the config sets use_rslora, expected a config that torchtune wrote; this adapter needs no "
            "repair"
        )
    scaling = float(config["lora_alpha"]) / int(config["r"])
    ranks = {prefix_free(layer): saved.weights[f"{layer}.lora_A.weight"].shape[0] for layer in saved.scalings}
    if not ranks:
        raise ValueError(f"{directory}: found no LoRA layers in the weights; pass an adapter that torchtune saved")
    config["rank_pattern"] = {"^" + re.escape(name): rank for name, rank in ranks.items()}
    config["alpha_pattern"] = {"^" + re.escape(name): scaling * rank for name, rank in ranks.items()}
    (Path(directory) / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return ranks
