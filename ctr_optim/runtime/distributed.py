"""What processes have to agree on, through torch.distributed; the identity in a single process.

FSDP2 (``fully_shard``) leaves each process a part of every parameter, as a DTensor. LoRA's weights are few: each
process gathers their gradients whole, does the same work on them, and writes its own part of the step. Parameters of no
LoRA layer may be large; they and their state stay in parts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 for a single process."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return world_size() == 1 or dist.get_rank() == 0


def add_up(tensors: Sequence[Tensor]) -> int:
    """Sum each tensor over all processes, in place and in one message per dtype; returns the number of processes."""
    world = world_size()
    if world > 1:
        for dtype in {t.dtype for t in tensors}:
            some = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in some])
            dist.all_reduce(flat)
            for t, part in zip(some, torch.split(flat, [t.numel() for t in some]), strict=True):
                t.copy_(part.view_as(t))
    return world


def of_first(value: T) -> T:
    """The first process's ``value``, a plain Python object."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def of_all(value: T) -> list[T]:
    """Every process's ``value``, a plain Python object, in the order of the processes."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def copy_first_(tensors: Sequence[Tensor]) -> None:
    """Overwrite each tensor with the first process's: rounding must not tell processes apart."""
    for t in tensors if world_size() > 1 else ():
        sent = t.contiguous()  # NCCL takes nothing else
        dist.broadcast(sent, 0)
        if sent is not t:
            t.copy_(sent)


def mean(sum_and_count: tuple[Tensor, Tensor] | None, like: Tensor) -> Tensor:
    """``()`` a sum over its count, both over all processes; one without them contributes nothing. NaN: nobody has."""
    total = like.new_zeros(2) if sum_and_count is None else torch.stack(sum_and_count).to(like)
    add_up([total])
    return total[0] / total[1]


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world_size() == 1:
        return value
    found = value.clone()
    add_up([found])
    return found


def largest(value: Tensor) -> Tensor:
    """The largest of each entry over all processes."""
    if world_size() == 1:
        return value
    found = value.clone()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def everywhere(condition: Tensor | bool, like: Tensor | None = None) -> Tensor:
    """``()`` whether a condition holds in every process.

    Args:
        condition: this process's own.
        like: a tensor on the device that the processes talk through, for a condition that is no tensor.
    """
    device = condition.device if isinstance(condition, Tensor) else None if like is None else like.device
    fails = torch.as_tensor(condition, device=device).logical_not().float()
    add_up([fails])
    return fails == 0


def agree(value: float, like: Tensor) -> bool:
    """Whether all processes hold the same number; waits for the device that ``like`` is on."""
    mine = torch.tensor(value, dtype=torch.float64, device=like.device)
    first = mine.clone()
    copy_first_([first])
    return bool(everywhere(first == mine))


# -- parameters in parts ----------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part only."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and without it there are no DTensors
    return module is not None and isinstance(tensor, module.DTensor)


def layout(tensor: Tensor) -> Any:
    """How a tensor is cut up; equal for tensors that can be stacked before they are gathered. None: it is whole."""
    return (tensor.device_mesh, tuple(tensor.placements)) if is_sharded(tensor) else None  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def stack_whole(tensors: Sequence[Tensor]) -> Tensor:
    """``(L, *shape)`` of L tensors of one shape and layout, whole on every process; one message for all of them."""
    if not is_sharded(tensors[0]):
        return torch.stack(list(tensors))
    shape = (len(tensors), *tensors[0].shape)
    return _from_parts(torch.stack([local(t) for t in tensors]), tensors[0], shape, 1).full_tensor()  # type: ignore


def whole(tensor: Tensor) -> Tensor:
    """A tensor as a whole; in parts, every process takes part."""
    return stack_whole([tensor])[0] if is_sharded(tensor) else tensor


def write_(target: Tensor, value: Tensor) -> None:
    """Overwrite ``target`` with ``value``, whole and the same on every process; no message."""
    local(target).copy_(parts(value.unsqueeze(0), target)[0])


def parts(stacked: Tensor, like: Tensor) -> list[Tensor]:
    """This process's parts of L whole tensors ``(L, *shape)``, cut up as ``like`` is; no message."""
    if not is_sharded(like):
        return list(stacked.unbind(0))
    from torch.distributed.tensor import DTensor, Replicate

    mesh, _ = layout(like)
    everywhere_whole = DTensor.from_local(stacked, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return list(everywhere_whole.redistribute(mesh, _placements(like, 1)).to_local().unbind(0))


def as_parts(part: Tensor, like: Tensor) -> Tensor:
    """This process's part as a tensor cut up as ``like`` is, so that checkpoints know it for one; no message."""
    return _from_parts(part, like, like.shape, 0) if is_sharded(like) else part


def sum_over_parts(value: Tensor, like: Tensor) -> Tensor:
    """A sum over the parts of tensors cut up as ``like`` is, from this process's term."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = layout(like)
    terms = [Partial() if p.is_shard() else Replicate() for p in placements]
    return DTensor.from_local(value, mesh, terms, run_check=False).full_tensor()


def fsdp_modules(roots: Iterable[nn.Module]) -> list[Any]:
    """The modules below ``roots`` that FSDP2 wraps."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [m for root in roots for m in root.modules() if isinstance(m, kind)]


def reshard(modules: Iterable[Any]) -> None:
    """Drop the gathered copies of FSDP2's parameters, so that the next forward sees what the parts hold by then.

    FSDP2 keeps the outermost module's copy after a forward; that is stale once parameters have moved.
    """
    for module in modules:
        module.reshard()


def _placements(like: Tensor, offset: int) -> list[Any]:
    """The layout of ``like``, every sharded dimension ``offset`` further back."""
    from torch.distributed.tensor import Shard

    return [Shard(p.dim + offset) if p.is_shard() else p for p in layout(like)[1]]


def _from_parts(part: Tensor, like: Tensor, shape: Sequence[int], offset: int) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(  # type: ignore[no-any-return]
        part, layout(like)[0], _placements(like, offset), run_check=False, shape=torch.Size(shape), stride=stride
    )
