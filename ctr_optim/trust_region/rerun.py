"""Tools to re-run a model without side effects: copies of inputs, and the state of random generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask


class CannotRerun(Exception):
    """Error for inputs that cannot safely be used twice."""


class Generators:
    """State of the global random generators of torch, NumPy and Python."""

    def __init__(self) -> None:
        initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.torch = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if initialized else [])]
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")  # Without an import, nothing can use NumPy's generator.
        self.numpy = None if numpy is None else numpy.random.get_state(legacy=False)

    def restore(self) -> None:
        """Restore all generators."""
        torch.set_rng_state(self.torch[0])
        for device, state in enumerate(self.torch[1:]):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def unmoved(self) -> bool:
        """Return whether no generator has been used since."""
        now = Generators()
        if len(now.torch) != len(self.torch) or not all(map(torch.equal, self.torch, now.torch)):
            return False
        return self.python == now.python and _same(self.numpy, now.numpy)


def generators() -> Generators | None:
    """Return the state of every generator; None in a compiled graph, which cannot read it."""
    return None if torch.compiler.is_compiling() else Generators()


def _same(a: Any, b: Any) -> bool:
    """Return whether two nested states, which may contain NumPy arrays, are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a.tobytes() == b.tobytes()) if hasattr(a, "tobytes") and hasattr(b, "tobytes") else bool(a == b)


def common_ancestors(root: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """Return the modules that contain all ``layers``, outermost first."""
    wanted = {id(m) for m in layers}
    paths = [name.split(".") for name, module in root.named_modules() if id(module) in wanted]
    chain, module = [root], root
    for depth in range(min(map(len, paths), default=1) - 1):
        if len({path[depth] for path in paths}) > 1:
            break
        module = getattr(module, paths[0][depth])
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            chain.append(module)
    # A compiled model runs its own hooks eagerly, but traces those of its submodules. Keep hooks out of the graph.
    return chain[:1] if hasattr(root, "_orig_mod") else chain


def tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors_in(value)


def sequences_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the batch size of a forward pass's inputs; None if they cannot be cut along dimension 0.

    A cut is safe only if all tensors have the same first dimension and no other input has entries per sequence.
    Lists of numbers or images may have such entries, and so has Qwen2-VL's ``position_ids`` of shape (3, B, S).
    """
    inputs = [*args, *kwargs.values()]
    if any(isinstance(value, BlockMask) for value in inputs):
        return None
    sizes = {t.shape[0] for t in tensors_in(inputs) if t.dim() > 0}
    positions = kwargs.get("position_ids")
    if len(sizes) != 1 or (isinstance(positions, Tensor) and positions.dim() == 3):
        return None
    (size,) = sizes
    return size if size > 0 and not any(_lists_sequences(value, size) for value in inputs) else None


def _lists_sequences(value: Any, size: int) -> bool:
    """Return whether a list in the inputs may have one entry per sequence."""
    if isinstance(value, dict):
        return any(_lists_sequences(v, size) for v in value.values())
    if not isinstance(value, (tuple, list)):
        return False
    if any(isinstance(v, (bool, int, float, str)) for v in value) or (len(value) == size > 1):
        return True
    return any(_lists_sequences(v, size) for v in value)


def take(tree: Any, keep: int | None) -> Any:
    """Return nested inputs with copies of the first ``keep`` rows of every tensor; None: of all rows.

    Raises:
        CannotRerun: for an input of a type that cannot be copied safely.
    """
    if isinstance(tree, Tensor):
        return (tree[:keep] if tree.dim() > 0 else tree).detach().clone()
    if isinstance(tree, dict):
        return {key: take(value, keep) for key, value in tree.items()}
    if (isinstance(tree, tuple) and type(tree) is tuple) or isinstance(tree, list):
        return type(tree)(take(value, keep) for value in tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a NamedTuple, as torchtitan's bounds of packed sequences
        return type(tree)(*(take(value, keep) for value in tree))
    if isinstance(tree, BlockMask):  # FlexAttention's masks never change in place.
        return tree
    if tree is None or isinstance(tree, (bool, int, float, str, torch.dtype, torch.device)):
        return tree
    raise CannotRerun(f"an input of type {type(tree).__name__} cannot be run twice")


def versions(tree: Any) -> list[int]:
    """Return the version counter of each tensor in nested inputs, which every in-place change increases."""
    return [-1 if t.is_inference() else t._version for t in tensors_in(tree)]
