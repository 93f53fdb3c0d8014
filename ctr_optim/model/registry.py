"""Registry of the supported LoRA libraries, and the search for LoRA layers in all of them."""

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
}  # by library: a function that yields its LoRA layers below a module


def find_pairs(root: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> list[LoRAPair]:
    """Return the LoRA layers below ``root``, library by library, in the order of ``root.named_modules()``.

    If one layer carries several adapters, each pair's name ends with the adapter's name in square brackets.

    Args:
        root: the model.
        parameters: keep only pairs whose A or B is among these; ``None`` keeps all pairs.
    """
    pairs = [pair for find in LIBRARIES.values() for pair in find(root)]
    if parameters is not None:
        wanted = {id(p) for p in parameters}
        pairs = [pair for pair in pairs if id(pair.A) in wanted or id(pair.B) in wanted]
    adapters_on = Counter(pair.name for pair in pairs)
    return [
        pair if adapters_on[pair.name] == 1 else replace(pair, name=f"{pair.name}[{pair.adapter}]") for pair in pairs
    ]
