"""Resizing of a model's LoRA layers to the ranks in a checkpoint, so that the checkpoint can be loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.linalg.shapes import sized
from ctr_optim.model.pair import LoRAPair
from ctr_optim.model.registry import find_pairs
from ctr_optim.runtime.distributed import world_size
from ctr_optim.runtime.hooks import Hook
from ctr_optim.settings import keeps_shapes

_PREFIX = re.compile(r"^(?:module\.)?(?:_orig_mod\.)?(?:base_model\.model\.)?")
_FILES = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")


def match_ranks(
    model: nn.Module, checkpoint: str | os.PathLike[str] | Mapping[str, Tensor], adapter: str | None = None
) -> dict[str, int]:
    """Resize every LoRA layer of ``model`` to its rank in ``checkpoint``; call this before loading the checkpoint.

    You only need it if you load the model before you build the optimizer. An optimizer with a ``rank_scheduler``
    resizes the layers automatically when its model loads a state dict.

    Args:
        model: a model with LoRA layers.
        checkpoint: a state dict, or the path of a file or directory with adapter weights.
        adapter: the adapter of weights whose names contain no adapter name, as in PEFT's files; None for the model's
            only or active adapter. Only needed if the model carries several adapters.

    Returns:
        the new rank of each resized layer, by the layer's name.

    Raises:
        FileNotFoundError: if there are no adapter weights at this path.
        ValueError: if the checkpoint holds no weights of the model's LoRA layers, or it is ambiguous to which adapter
            they belong.
    """
    weights = checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    incoming: dict[str, dict[str | None, Tensor]] = {}
    for key, value in weights.items():
        name, owner = _split(key)
        incoming.setdefault(name, {})[owner] = value
    modules = {id(module): name for name, module in model.named_modules()}
    alike: dict[str, list[LoRAPair]] = {}
    for pair in find_pairs(model):
        alike.setdefault(_split(modules[id(pair.down)] + ".weight")[0], []).append(pair)
    matched = [
        (pair, weight)
        for name, pairs in alike.items()
        for pair in pairs
        if (weight := _weight_of(pair, pairs, incoming.get(name, {}), adapter)) is not None
    ]
    changed = {}
    for pair, weight in matched:
        if weight.shape[0] != pair.rank:
            make_room(pair, weight.shape[0])
            changed[pair.name] = pair.rank
    if not matched:
        raise ValueError(
            "match_ranks: the checkpoint has no weights for the model's LoRA layers; check that it belongs to this "
            "model and not to another model"
        )
    return changed


def make_room(pair: LoRAPair, rank: int) -> None:
    """Change the rank of a LoRA layer in place, by cutting its weights or padding them with zeros.

    Args:
        pair: the LoRA layer.
        rank: the new rank.
    """
    a, b = pair.A.detach(), pair.B.detach()
    keep = min(rank, pair.rank)
    new_a, new_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    new_a[:keep], new_b[:, :keep] = a[:keep], b[:, :keep]
    pair.resize(new_a, new_b)


def resize_on_load(
    pair: LoRAPair,
    resize: str = "auto",
    loaded: Callable[[LoRAPair, bool], None] | None = None,
    moves: bool = True,
) -> list[Any]:
    """Register hooks that let a LoRA layer load weights of another rank, and return their handles.

    The hooks raise an error with a remedy for weights that cannot be loaded; torch would only report size mismatches.

    Args:
        pair: the LoRA layer.
        resize: the optimizer's option. With ``"masked"``, and with ``"auto"`` in several processes, the layer keeps its
            shapes: weights of smaller rank are padded with zeros, and larger ranks raise an error. Otherwise the layer
            takes the rank of the weights.
        loaded: function to call with the pair and whether its shapes changed.
        moves: whether ranks may change; if False, weights of another rank raise an error.
    """

    def fit(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        incoming = state_dict.get(prefix + "weight")
        if incoming is None:
            return
        dim = 0 if module is pair.down else 1
        rank = incoming.shape[dim]
        masked = keeps_shapes(resize, lambda: world_size() > 1)
        if rank != pair.rank and not moves:
            raise RuntimeError(
                f"{pair.name}: the weights to load have rank {rank}, but the model's layer has rank {pair.rank}. "
                "The run that saved them changed its ranks: call ctr_optim.match_ranks(model, weights) first, or "
                "pass callbacks=[CTRCallback()] to the trainer (ctr_optim.integrations.transformers, .lightning)"
            )
        if rank > pair.rank and masked:
            raise RuntimeError(
                f"{pair.name}: the weights to load have rank {rank}, but the layer keeps its {pair.rank} directions "
                "(several processes, or resize='masked'). Build the adapter with a larger r, or call "
                "ctr_optim.match_ranks(model, weights) before you build the optimizer and wrap the model"
            )
        changes = rank != pair.rank and not masked
        if changes:
            make_room(pair, rank)
        elif rank < pair.rank:
            state_dict[prefix + "weight"] = sized(incoming, (dim,), pair.rank)
        if loaded is not None:
            loaded(pair, changes)

    halves: tuple[Any, ...] = (pair.down, pair.up)
    return [m.register_load_state_dict_pre_hook(Hook(fit, id(m))) for m in halves]


def _split(key: str) -> tuple[str, str | None]:
    """Return a parameter's name without adapter and wrapper names, and the adapter's name (None in PEFT's files)."""
    parts = [part for part in _PREFIX.sub("", key).split(".") if part != "_orig_mod"]
    owner = None
    for half in ("lora_A", "lora_B"):
        if half in parts:
            end = parts.index(half) + 1
            owner = ".".join(parts[end:-1]) or None
            parts = [*parts[:end], "weight"]
    return ".".join(parts), owner


def _weight_of(
    pair: LoRAPair, alike: Sequence[LoRAPair], incoming: Mapping[str | None, Tensor], adapter: str | None
) -> Tensor | None:
    """Return the checkpoint's A for a pair; None if the checkpoint has none.

    Args:
        pair: the LoRA layer.
        alike: all pairs of the same layer, one for each adapter.
        incoming: the layer's A in the checkpoint, by adapter name; key None if the weight's name contains no adapter.
        adapter: the adapter of weights whose names contain no adapter name; None for the active one.
    """
    if pair.adapter in incoming and (pair.adapter is not None or len(alike) == 1):
        return incoming[pair.adapter]
    nameless = incoming.get(None)
    if len(alike) == 1:
        # A layer's only adapter may have another name in the checkpoint: libraries allow to rename it on loading.
        return nameless if nameless is not None else next(iter(incoming.values())) if len(incoming) == 1 else None
    if nameless is None:
        return None
    active = list(getattr(pair.layer, "active_adapters", ())) if adapter is None else [adapter]
    if len(active) != 1:
        raise ValueError(
            f"match_ranks: {pair.name} carries the adapters {[p.adapter for p in alike]}, of which {active} are "
            "active, and the names in the checkpoint contain no adapter name; pass match_ranks(..., adapter=name)"
        )
    return nameless if pair.adapter == active[0] else None


def _read(path: Path) -> Mapping[str, Tensor]:
    files = [path] if path.is_file() else [path / name for name in _FILES if (path / name).is_file()]
    if not files:
        raise FileNotFoundError(f"match_ranks: found no weights in {path}; expected one of {', '.join(_FILES)}")
    if files[0].suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(files[0])
    loaded: Mapping[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    return loaded
