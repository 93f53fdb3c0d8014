"""Checks of arguments that Python or torch would reject with a less helpful message, or accept silently."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")

_CLOSE = 0.87  # least similarity that makes a key a misspelt option; frameworks and users may add their own keys


def suggests_options(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function: for an unknown keyword argument, its TypeError suggests the most similar known one."""
    parameters = inspect.signature(function).parameters
    known = [name for name, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY and name != "self"]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            owner = function.__qualname__.removesuffix(".__init__")
            raise TypeError(f"{owner}: unknown option {unknown!r}{nearest(unknown, known)}")
        return function(*args, **kwargs)

    return call


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean ...?"`` with the known name most similar to ``name``, or a list of the known names."""
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(sorted(known))}"


def check_group_keys(group: Any, own: Collection[str], others: Collection[str]) -> None:
    """Refuse keys of a parameter group that torch would store, but the optimizer would not read.

    Args:
        group: the parameter group.
        own: options of a parameter group.
        others: options of the whole optimizer.

    Raises:
        TypeError: for an option of the whole optimizer, or a misspelt option of a parameter group.
    """
    for name in group if isinstance(group, Mapping) else ():
        if name in others:
            raise TypeError(
                f"{name}: got it in a parameter group, expected it as an argument of CTROptimizer: it applies to the "
                "optimizer as a whole"
            )
        close = difflib.get_close_matches(name, own, n=1, cutoff=_CLOSE) if name not in own else []
        if close:
            raise TypeError(f"params: unknown option {name!r} in a parameter group; did you mean {close[0]!r}?")


def given_parameters(params: Any) -> Any:
    """Return the user's parameters or parameter groups, as a list if they are an iterable.

    Args:
        params: the first argument of the optimizer.

    Raises:
        TypeError: if ``params`` is a module, or a parameter group holds one.
        ValueError: if there are no parameters.
    """
    if isinstance(params, nn.Module):
        raise TypeError(f"params: got a {type(params).__name__}, expected parameters; pass model.parameters()")
    if not isinstance(params, Iterable) or isinstance(params, (Mapping, Tensor)):
        return params  # torch.optim.Optimizer raises an error for these
    given = list(params)
    for group in given:
        if isinstance(group, Mapping) and isinstance(group.get("params"), nn.Module):
            kind = type(group["params"]).__name__
            raise TypeError(f"params: got a {kind} in a parameter group, expected parameters; pass model.parameters()")
    if not given:
        used = ": the generator is used up; create a new one, or pass a list" if isinstance(params, Iterator) else ""
        raise ValueError(
            f"params: got an empty parameter list{used}. If you select parameters by requires_grad, add the adapter to "
            "the model first (PeftModel.from_pretrained needs is_trainable=True)"
        )
    return given
