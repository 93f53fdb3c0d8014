"""Hooks on the user's model that stay behind when it is copied, pickled or saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

from torch import nn


class Hook:
    """Calls ``act`` for the one module that it was made for.

    ``copy.deepcopy`` and ``pickle`` take a module's hooks along: what they take of this one does nothing.
    """

    def __init__(self, act: Callable[..., Any], owner: int) -> None:
        self.act, self.owner = act, owner

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return self.act(module, *args) if id(module) == self.owner else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing, 0)


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object alive; once that is gone, it does nothing."""
    reference = WeakMethod(method)

    def call(*args: Any) -> Any:
        alive = reference()
        return None if alive is None else alive(*args)

    return call


def _nothing(*_: Any) -> None:
    """Do nothing: the hook of a copied module."""
