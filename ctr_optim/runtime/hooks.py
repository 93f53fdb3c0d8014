"""Hooks on the user's model that do nothing in copies of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakMethod

import torch
from torch import nn

_silent = 0  # number of open contexts of silent()


@contextmanager
def silent() -> Iterator[None]:
    """Return a context in which no hook acts: for passes with gradients that are not the user's training."""
    global _silent
    _silent += 1
    try:
        yield
    finally:
        _silent -= 1


def in_backward() -> bool:
    """Return whether autograd is running a backward pass in this thread; False in a compiled graph."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _transformed() -> bool:
    """Return whether ``torch.jit.trace`` or a transform of :mod:`torch.func` runs, whose tensors must not stay."""
    if torch.compiler.is_compiling():
        return False
    traced: bool = torch.jit.is_tracing()  # type: ignore
    return traced or torch._C._functorch.peek_interpreter_stack() is not None


class Hook:
    """Callable hook that calls ``act`` for one module only.

    ``copy.deepcopy`` and ``pickle`` copy a module together with its hooks. A copy of this hook does nothing. The hook
    also ignores passes under ``torch.jit.trace`` and transforms such as ``torch.func.vmap``, which are not training.

    Args:
        act: the function to call, as ``act(module, *args)``.
        owner: ``id`` of the module.
    """

    def __init__(self, act: Callable[..., Any], owner: int) -> None:
        self.act, self.owner = act, owner

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        if id(module) != self.owner or _silent or _transformed():
            return None
        return self.act(module, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing, 0)


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a bound method without keeping its object alive.

    Once the object is deleted, the function does nothing and returns None.
    """
    reference = WeakMethod(method)

    def call(*args: Any) -> Any:
        alive = reference()
        return None if alive is None else alive(*args)

    return call


def _nothing(*_: Any) -> None:
    """Do nothing: the hook of a copied module."""
