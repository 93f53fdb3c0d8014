"""LoRA pairs of a model, found by every library that this package knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from ctr_optim.model import peft, plain, torchtune
from ctr_optim.model.pair import LoRAPair

LIBRARIES: dict[str, Callable[[nn.Module], Iterable[LoRAPair]]] = {
    "peft": peft.find,
    "torchtune": torchtune.find,
    "plain": plain.find,
}  # each finds the pairs of one library below a module


def find_pairs(root: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> list[LoRAPair]:
    """LoRA pairs below ``root``, in the order of ``root.named_modules()`` for each library.

    Args:
        root: the model.
        parameters: keep only pairs with A or B among these; ``None`` keeps all pairs.

    Where one layer carries several adapters, each name is followed by its adapter's in brackets.
    """
    pairs = [pair for find in LIBRARIES.values() for pair in find(root)]
    if parameters is not None:
        wanted = {id(p) for p in parameters}
        pairs = [pair for pair in pairs if id(pair.A) in wanted or id(pair.B) in wanted]
    adapters_on = Counter(pair.name for pair in pairs)
    return [
        pair if adapters_on[pair.name] == 1 else replace(pair, name=f"{pair.name}[{pair.adapter}]") for pair in pairs
    ]
