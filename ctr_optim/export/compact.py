"""Save a PEFT adapter without its unused directions."""

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
    """Save a PEFT model's adapter without the directions that are zero. The model does not change.

    PEFT's ``save_pretrained`` writes the allocated ranks after masked training. This function writes the ranks in use,
    and leaves out layers of rank 0. DoRA layers of rank 0 stay, because their magnitudes are trained, too. The most
    frequent rank becomes the config's ``r``; ``rank_pattern`` lists the other layers. Under FSDP2, call the function in
    every process; the first process writes.

    Args:
        model: a ``PeftModel`` with a LoRA adapter.
        directory: directory to write, with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter: the adapter's name (default: "default").

    Returns:
        Written rank by layer name; 0 for layers that were left out.

    Raises:
        TypeError: ``model`` is not a PEFT model with this adapter.
        ValueError: all directions are zero, so there is nothing to save.
    """
    weights, scalings, config = adapter_of(model, adapter, "export_compact")
    kept, ranks = compact(weights, keep_empty=bool(config.use_dora))
    name = {layer: prefix_free(layer) for layer in ranks}
    if not any(ranks.values()):
        raise ValueError(
            "export_compact: every direction of the adapter is zero, so there is nothing to save; train the adapter "
            "first"
        )
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
    """Remove directions that are zero in both A and B; return the remaining weights, and ranks by layer name.

    Args:
        weights: weights by PEFT's saved names. Layers whose A is not a matrix stay unchanged.
        keep_empty: whether a layer of rank 0 keeps one direction of zeros. Otherwise it is left out.
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
    """Return PEFT's ``exclude_modules`` with ``names`` added; ``before`` is None, names, or a regular expression."""
    if not names:
        return before
    if isinstance(before, str):
        return "|".join([before, *map(re.escape, names)])
    return sorted({*(before or ()), *names})
