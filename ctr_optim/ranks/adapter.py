"""A trained adapter's weights, and their best approximations of smaller ranks."""

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
    """The layers of one adapter, and copies of the weights that they began with, by layer."""

    def __init__(self, pairs: Iterable[LoRAPair]) -> None:
        self.pairs = {pair.name: pair for pair in pairs}
        self.whole: Weights = {n: (p.A.detach().clone(), p.B.detach().clone()) for n, p in self.pairs.items()}

    @property
    def costs(self) -> dict[str, int]:
        """Parameters of one direction, by layer."""
        return {name: pair.cost for name, pair in self.pairs.items()}

    def empty(self, name: str) -> bool:
        """Whether a layer began with a single direction of zeros, in place of none."""
        a, b = self.whole[name]
        return len(a) == 1 and not bool(a.any() or b.any())

    @torch.no_grad()
    def cut(self, directions: Mapping[str, Existing], ranks: Mapping[str, int]) -> Weights:
        """Return the best approximations ``(N A, B M)`` of these ranks; layers that keep their rank keep their weights.

        Args:
            directions: of the weights that the adapter began with.
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
        """Write weights into the shapes that the layers have; directions that are missing become zero."""
        for name, (a, b) in weights.items():
            pair = self.pairs[name]
            pair.A.copy_(sized(a, (0,), pair.rank))
            pair.B.copy_(sized(b, (1,), pair.rank))

    @torch.no_grad()
    def resize(self, weights: Weights) -> None:
        """Give layers weights of any rank; a layer without directions gets one that is zero."""
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
        name: the adapter's name; None for the only one, or else the active one.
        who: the caller's name, for error messages.

    Raises:
        ValueError: for a model without LoRA layers, and for an adapter that cannot be cut.
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
            raise ValueError(f"{who}: the model holds the adapters {sorted(map(str, names))}; choose one: adapter=...")
    pairs = [pair for pair in pairs if name is None or pair.adapter == name]
    if not pairs:
        raise ValueError(f"{who}: found no adapter {name!r}; the model holds {sorted(map(str, names))}")
    if world_size() > 1 or any(is_sharded(pair.B) for pair in pairs):
        raise ValueError(
            f"{who}: got a model in {world_size()} processes, expected a single process and whole parameters; save the "
            "adapter and cut it afterwards (ctr-optim compress)"
        )
    merged = [pair.name for pair in pairs if getattr(pair.layer, "merged", False)]
    if merged:
        raise ValueError(f"{who}: the adapter is merged into {merged[0]!r}; call model.unmerge_adapter() first")
    if (start := changes_base([model], pairs)) is not None:
        raise ValueError(
            f"{who}: init_lora_weights={start!r} took the first adapter out of the base weights, and PEFT would take "
            "out one of another rank when it loads the result; convert the adapter to plain LoRA first: "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    return Adapter(pairs)


def _unique(pairs: Sequence[LoRAPair]) -> list[LoRAPair]:
    """One pair for each B: tied modules hold the same parameters."""
    return list({id(pair.B): pair for pair in pairs}.values())


def _active(model: Any) -> str | None:
    """The one adapter that is active, by PEFT's account."""
    active = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active
    return active[0] if isinstance(active, (list, tuple)) and len(active) == 1 else None
