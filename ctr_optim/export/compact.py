"""A PEFT adapter of exactly the directions in use."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ctr_optim.export.adapter import adapter_of, half_of, write
from ctr_optim.export.files import prefix_free


def export_compact(model: Any, directory: str | os.PathLike[str], adapter: str = "default") -> dict[str, int]:
    """Save a PEFT model's adapter without the directions that are zero; the model itself is not touched.

    What masked training saves is a plain adapter, too, of the ranks that were allocated. This one holds those in use,
    and leaves out layers that use none (with DoRA they stay: their magnitude is trained, too). The most frequent rank
    becomes the config's ``r``; ``rank_pattern`` names the other layers.
    Under FSDP2 every process calls it; the first one writes.

    Args:
        model: a ``PeftModel`` with a LoRA adapter.
        directory: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        adapter: its name.

    Returns:
        the ranks written, by layer; 0 for what was left out.

    Raises:
        TypeError: if ``model`` is no PEFT model with that adapter.
        ValueError: if no layer uses any direction: there is nothing to save.
    """
    weights, scalings, config = adapter_of(model, adapter, "export_compact")
    kept, ranks = compact(weights, keep_empty=bool(config.use_dora))
    name = {layer: prefix_free(layer) for layer in ranks}
    if not any(ranks.values()):
        raise ValueError("export_compact: every direction of the adapter is zero; there is nothing to save")
    root = {layer: math.sqrt(rank) if config.use_rslora else rank for layer, rank in ranks.items()}
    kinds = {layer: (rank, scalings[layer] * root[layer]) for layer, rank in ranks.items() if rank}
    config.r, config.lora_alpha = Counter(kinds.values()).most_common(1)[0][0]
    patterns = {layer: "^" + re.escape(name[layer]) for layer in kinds}
    config.rank_pattern = {patterns[layer]: r for layer, (r, _) in kinds.items() if r != config.r}
    config.alpha_pattern = {patterns[layer]: a for layer, (_, a) in kinds.items() if a != config.lora_alpha}
    config.exclude_modules = _excluded(
        config.exclude_modules, [name[layer] for layer, rank in ranks.items() if not rank]
    )
    write(config, kept, directory)
    return {name[layer]: rank for layer, rank in ranks.items()}


def compact(weights: Mapping[str, Tensor], keep_empty: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Weights without directions that are zero in both A and B, and the ranks left, by layer.

    Args:
        weights: as PEFT saves them; layers whose halves are no matrices stay as they are.
        keep_empty: one zero direction stays where none is in use; else such layers are left out.
    """
    kept, ranks = dict(weights), {}
    for key, a in weights.items():
        if half_of(key) != "A":
            continue
        layer, other = key.partition(".lora_")[0], key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        b, ranks[layer] = weights[other], a.shape[0]
        if a.dim() != 2:
            continue
        used = (a != 0).any(1) | (b != 0).any(0)
        if keep_empty and not used.any():
            used[0] = True
        ranks[layer] = int(used.sum())
        kept[key], kept[other] = a[used], b[:, used]
    empty = {layer for layer, rank in ranks.items() if rank == 0}
    kept = {k: w.detach().cpu().contiguous() for k, w in kept.items() if k.partition(".lora_")[0] not in empty}
    return kept, ranks


def _excluded(before: Any, names: list[str]) -> Any:
    """PEFT's ``exclude_modules``, with ``names`` added to what it was: None, names, or one regular expression."""
    if not names:
        return before
    if isinstance(before, str):
        return "|".join([before, *map(re.escape, names)])
    return sorted({*(before or ()), *names})
