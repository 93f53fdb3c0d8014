"""Weights of a trained adapter, and their best approximations of smaller rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.linalg.shapes import sized
from ctr_optim.model.checks import changes_base
from ctr_optim.model.pair import LoRAPair
from ctr_optim.model.peft import PeftLibrary
from ctr_optim.model.registry import find_pairs
from ctr_optim.ranks.resize import projection
from ctr_optim.ranks.valuation import Existing
from ctr_optim.runtime.distributed import is_sharded, world_size

Weights = dict[str, tuple[Tensor, Tensor]]


class Adapter:
    """LoRA layers of one adapter, with a copy of their original weights.

    Attributes:
        pairs: layers by name.
        whole: original A ``(r, d_in)`` and B ``(d_out, r)`` by layer name.
    """

    def __init__(self, pairs: Iterable[LoRAPair]) -> None:
        self.pairs = {pair.name: pair for pair in pairs}
        self.whole: Weights = {n: (p.A.detach().clone(), p.B.detach().clone()) for n, p in self.pairs.items()}

    @property
    def costs(self) -> dict[str, int]:
        """Number of parameters of one direction, by layer name."""
        return {name: pair.cost for name, pair in self.pairs.items()}

    def empty(self, name: str) -> bool:
        """Return whether a layer's original weights are one direction of zeros, which stands for rank 0."""
        a, b = self.whole[name]
        return len(a) == 1 and not bool(a.any() or b.any())

    @torch.no_grad()
    def cut(self, directions: Mapping[str, Existing], ranks: Mapping[str, int]) -> Weights:
        """Return the best approximations ``(N A, B M)`` of the given ranks.

        Layers that keep their rank keep their weights.

        Args:
            directions: singular directions of the original weights, by layer name.
            ranks: new rank, by layer name.
        """
        weights = dict(self.whole)
        for name, rank in ranks.items():
            a, b = self.whole[name]
            if rank < len(a):
                on = projection(directions[name], rank)
                keep, restore = on.keep.to(a.device), on.restore.to(a.device)
                weights[name] = (keep @ a.double()).to(a), (b.double() @ restore).to(b)
        return weights

    @torch.no_grad()
    def write(self, weights: Weights) -> None:
        """Write weights into the layers, padded with zeros to each layer's current rank."""
        for name, (a, b) in weights.items():
            pair = self.pairs[name]
            pair.A.copy_(sized(a, (0,), pair.rank))
            pair.B.copy_(sized(b, (1,), pair.rank))

    @torch.no_grad()
    def resize(self, weights: Weights) -> None:
        """Give each layer weights of any rank. A layer of rank 0 gets one direction of zeros."""
        for name, (a, b) in weights.items():
            pair, room = self.pairs[name], max(1, len(a))
            a, b = sized(a, (0,), room), sized(b, (1,), room)
            if room != pair.rank:
                pair.resize(a, b)
            else:
                pair.A.copy_(a)
                pair.B.copy_(b)
        for pair in {id(pair.library): pair for pair in self.pairs.values()}.values():
            if isinstance(pair.library, PeftLibrary) and pair.adapter is not None:
                pair.library.tidy(pair.adapter)


def adapter_of(model: nn.Module, name: str | None, who: str) -> Adapter:
    """Return the LoRA layers of one adapter.

    Args:
        model: a model with LoRA layers.
        name: the adapter's name. None selects the only adapter, or the active one of several.
        who: the caller's name, for error messages.

    Raises:
        ValueError: the model has no LoRA layers, no adapter of this name, or several adapters and none is chosen; or
            the adapter cannot be cut (several processes, sharded or merged weights, a changed base model).
    """
    pairs = _unique(find_pairs(model))
    if not pairs:
        raise ValueError(
            f"{who}: found no LoRA layers in {type(model).__name__}; load the adapter into the model first"
        )
    names = {pair.adapter for pair in pairs}
    if name is None and len(names) > 1:
        name = _active(model)
        if name is None:
            raise ValueError(
                f"{who}: the model holds the adapters {sorted(map(str, names))}; choose one with adapter=..."
            )
    pairs = [pair for pair in pairs if name is None or pair.adapter == name]
    if not pairs:
        raise ValueError(f"{who}: found no adapter {name!r}; the model holds {sorted(map(str, names))}")
    if world_size() > 1 or any(is_sharded(pair.B) for pair in pairs):
        raise ValueError(
            f"{who}: got a model in {world_size()} processes, expected a single process and unsharded parameters; save "
            "the adapter, then run ctr-optim compress on it"
        )
    merged = [pair.name for pair in pairs if getattr(pair.layer, "merged", False)]
    if merged:
        raise ValueError(f"{who}: the adapter is merged into {merged[0]!r}; call model.unmerge_adapter() first")
    if (start := changes_base([model], pairs)) is not None:
        raise ValueError(
            f"{who}: init_lora_weights={start!r} took the first adapter out of the base weights. When PEFT loads the "
            "cut adapter, it would subtract an adapter of another rank. Convert the adapter to plain LoRA first: "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    return Adapter(pairs)


def _unique(pairs: Sequence[LoRAPair]) -> list[LoRAPair]:
    """Return one pair for each B, because tied modules share their parameters."""
    return list({id(pair.B): pair for pair in pairs}.values())


def _active(model: Any) -> str | None:
    """Return the name of the active PEFT adapter; None if there is not exactly one."""
    active = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active
    return active[0] if isinstance(active, (list, tuple)) and len(active) == 1 else None
