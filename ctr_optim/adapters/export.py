"""A PEFT adapter in other words: exactly the directions in use, or one rank for readers that know only one."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctr_optim.adapters.files import CONFIG, WEIGHTS, prefix_free, read_adapter
from ctr_optim.distributed import is_first, whole


def export_compact(model: Any, directory: str | os.PathLike[str], adapter: str = "default") -> dict[str, int]:
    """Save a PEFT model's adapter without the directions that are zero; the model itself is not touched.

    What masked training saves is a plain adapter, too, of the ranks that were allocated. This one holds those in use,
    in ``rank_pattern``, and leaves out layers that use none (with DoRA they stay: their magnitude is trained, too).
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
    weights, scalings, config = _adapter_of(model, adapter, "export_compact")
    kept, ranks = compact(weights, keep_empty=bool(config.use_dora))
    name = {layer: prefix_free(layer) for layer in ranks}
    if not any(ranks.values()):
        raise ValueError("export_compact: every direction of the adapter is zero; there is nothing to save")
    root = {layer: math.sqrt(rank) if config.use_rslora else rank for layer, rank in ranks.items()}
    patterns = {layer: "^" + re.escape(name[layer]) for layer, rank in ranks.items() if rank}
    config.rank_pattern = {pattern: ranks[layer] for layer, pattern in patterns.items()}
    config.alpha_pattern = {pattern: scalings[layer] * root[layer] for layer, pattern in patterns.items()}
    config.exclude_modules = _excluded(
        config.exclude_modules, [name[layer] for layer, rank in ranks.items() if not rank]
    )
    _write(config, kept, directory)
    return {name[layer]: rank for layer, rank in ranks.items()}


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
    weights, scalings, config = _adapter_of(model, adapter, "export_uniform")
    padded, rank, scaling = pad(weights, scalings)
    config.r, config.lora_alpha, config.use_rslora = rank, scaling * rank, False
    config.rank_pattern, config.alpha_pattern = {}, {}
    _write(config, padded, directory)
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


def compact(weights: Mapping[str, Tensor], keep_empty: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Weights without directions that are zero in both A and B, and the ranks left, by layer.

    Args:
        weights: as PEFT saves them; layers whose halves are no matrices stay as they are.
        keep_empty: one zero direction stays where none is in use; else such layers are left out.
    """
    kept, ranks = dict(weights), {}
    for key, a in weights.items():
        if _half(key) != "A":
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


def _adapter_of(model: Any, adapter: str, who: str) -> tuple[dict[str, Tensor], dict[str, float], Any]:
    """An adapter's weights as PEFT saves them, every layer's scaling by its name there, and a copy of its config."""
    if adapter not in getattr(model, "peft_config", {}):
        raise TypeError(f"{who}: got {type(model).__name__}, expected a PeftModel with an adapter {adapter!r}")
    from peft import get_peft_model_state_dict

    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    weights = {key: whole(w) for key, w in get_peft_model_state_dict(model, adapter_name=adapter).items()}
    return weights, _scalings(model, adapter), config


def _write(config: Any, weights: Mapping[str, Tensor], directory: str | os.PathLike[str]) -> None:
    """What PEFT's ``save_pretrained`` would write."""
    from safetensors.torch import save_file

    if not is_first():
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    save_file(dict(weights), str(Path(directory) / WEIGHTS), metadata={"format": "pt"})


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
