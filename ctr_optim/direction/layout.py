"""Per-shape layout: all trained parameters, stacked with their state so that one batched call serves many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ctr_optim.direction.stack import Stack, initial_state
from ctr_optim.model.coordinates import VECTORS
from ctr_optim.model.pair import LoRAPair
from ctr_optim.runtime import distributed

Groups = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class PairStacks:
    """LoRA pairs of one shape, dtype, device and parameter group.

    Attributes:
        pairs: the pairs.
        indices: their indices in the optimizer's list of pairs.
        a, b: stacks of their A and B; ``a`` is None if A is not trained, or belongs to another layer.
        borrowed: for pairs whose A belongs to another layer, the stack and the row that hold this A. A shared A is
            stacked once, because one parameter takes one step.
    """

    pairs: list[LoRAPair]
    indices: list[int]
    a: Stack | None
    b: Stack
    borrowed: list[tuple[Stack, int]]


@dataclass(frozen=True)
class Layout:
    """Stacks of LoRA pairs, and stacks of all other trained parameters."""

    pairs: list[PairStacks]
    others: list[Stack]

    @property
    def stacks(self) -> list[Stack]:
        """All stacks; those of LoRA pairs come first."""
        return [s for pair in self.pairs for s in ((pair.b,) if pair.a is None else (pair.a, pair.b))] + self.others


def lay_out(
    pairs: Sequence[LoRAPair], groups: Groups, state: Any, prepare: Callable[[Any, list[nn.Parameter]], None]
) -> Layout:
    """Stack all trained parameters by shape, and return the layout.

    Parameters of one stack share shape, dtype, device, sharding and parameter group. With ``foreach=False``, each pair
    and each other parameter has its own stack.

    Args:
        pairs: LoRA pairs whose moments use a basis along the rank dimension.
        groups: parameter groups.
        state: the optimizer's state, to which this function adds missing moments.
        prepare: called with the state and all parameters before they are stacked; adds further tensors to the state.
    """
    group_of = {id(p): group for group in groups for p in group["params"]}
    rank_dims = {id(p): dim for pair in pairs for p, dim in ((pair.A, -2), (pair.B, -1))}
    kept = [p for group in groups for p in group["params"] if p.requires_grad or id(p) in rank_dims]
    for p in kept:
        if id(p) in rank_dims and "basis" not in state[p]:  # trained alone before: the state lacks only the basis
            state[p].update({**initial_state(p, rank_dims[id(p)]), **state[p]})
        elif not state[p]:
            state[p].update(initial_state(p, None))
    prepare(state, kept)
    owner: dict[int, int] = {}  # the first pair of each trained A
    alike: dict[Any, list[int]] = {}
    for index, pair in enumerate(pairs):
        group = group_of[id(pair.B)]
        kind = (pair.A.shape, pair.B.shape, pair.A.dtype, pair.B.dtype, pair.A.device)
        cut = (distributed.layout(pair.A), distributed.layout(pair.B))
        owns = id(pair.A) not in group_of or owner.setdefault(id(pair.A), index) == index
        key = (*kind, *cut, _columns(state.get(pair.A, {})), id(group_of.get(id(pair.A))), id(group), owns)
        alike.setdefault(key if group["foreach"] is not False else index, []).append(index)
    paired = []
    for indices in alike.values():
        some = [pairs[i] for i in indices]
        group_a = group_of.get(id(some[0].A)) if owner.get(id(some[0].A), indices[0]) == indices[0] else None
        a = None if group_a is None else Stack([pair.A for pair in some], group_a, state, -2)
        b = Stack([pair.B for pair in some], group_of[id(some[0].B)], state, -1)
        paired.append(PairStacks(some, indices, a, b, []))
    place = {id(p): (s.a, row) for s in paired if s.a is not None for row, p in enumerate(s.a.params)}
    for stacks in paired:
        if stacks.a is None and id(stacks.pairs[0].A) in place:
            stacks.borrowed.extend(place[id(pair.A)] for pair in stacks.pairs)
    others: dict[Any, list[nn.Parameter]] = {}
    for p, group in _trained(groups):
        if id(p) not in rank_dims:
            kin = (p.shape, p.dtype, p.device, distributed.layout(p), _columns(state[p]), id(group))
            others.setdefault(kin if group["foreach"] is not False else id(p), []).append(p)
    return Layout(paired, [Stack(some, group_of[id(some[0])], state, None) for some in others.values()])


def _columns(state: Any) -> int:
    """Return the number of eigenpairs of a parameter's retained-text coordinates; 0 without such coordinates."""
    return len(state[VECTORS]) if VECTORS in state else 0


def parameters_of(groups: Groups) -> list[nn.Parameter]:
    """Return all parameters of the groups, in order."""
    return [p for group in groups for p in group["params"]]


def same_parameters(one: Sequence[nn.Parameter], other: Sequence[nn.Parameter]) -> bool:
    """Whether two lists hold the same objects in the same order."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _trained(groups: Groups) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
    for group in groups:
        for p in group["params"]:
            if p.requires_grad:
                yield p, group
