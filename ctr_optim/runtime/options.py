"""Refusals of arguments that Python or torch would refuse in other terms, or take in silence."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")

_CLOSE = 0.87  # least similarity of a parameter group's key to an option: frameworks and users keep keys of their own


def suggests_options(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that an option that it does not know is refused with the nearest one that it knows."""
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
    """Return ``"; did you mean ...?"`` with the known name nearest to ``name``, or a list of the known names."""
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(sorted(known))}"


def check_group_keys(group: Any, own: Collection[str], others: Collection[str]) -> None:
    """Refuse keys of a parameter group that torch would store and nobody would read.

    Args:
        group: the parameter group.
        own: options of a group.
        others: options of the optimizer as a whole.

    Raises:
        TypeError: for an option of the optimizer as a whole, or a key that differs from an option by a slip.
    """
    for name in group if isinstance(group, Mapping) else ():
        if name in others:
            raise TypeError(
                f"{name}: got it in a parameter group, expected it as an argument of CTROptimizer: it holds for the "
                "optimizer as a whole"
            )
        close = difflib.get_close_matches(name, own, n=1, cutoff=_CLOSE) if name not in own else []
        if close:
            raise TypeError(f"params: unknown option {name!r} in a parameter group; did you mean {close[0]!r}?")


def given_parameters(params: Any) -> Any:
    """The parameters or parameter groups that a user passed, as a list where they are an iterable of them.

    Raises:
        TypeError: for a module in the parameters' place.
        ValueError: where there are no parameters.
    """
    if isinstance(params, nn.Module):
        raise TypeError(f"params: got a {type(params).__name__}, expected parameters; pass model.parameters()")
    if not isinstance(params, Iterable) or isinstance(params, (Mapping, Tensor)):
        return params  # torch says what is wrong with it
    given = list(params)
    for group in given:
        if isinstance(group, Mapping) and isinstance(group.get("params"), nn.Module):
            kind = type(group["params"]).__name__
            raise TypeError(f"params: got a {kind} in a parameter group, expected parameters; pass model.parameters()")
    if not given:
        used = ": the generator is used up; make it anew, or pass a list" if isinstance(params, Iterator) else ""
        raise ValueError(
            f"params: got an empty parameter list{used}. Where parameters are selected by requires_grad, add the "
            "adapter to the model first (PeftModel.from_pretrained needs is_trainable=True)"
        )
    return given
