"""Communication between processes through torch.distributed; in a single process these functions are the identity.

Under FSDP2 (``fully_shard``), each process holds one shard of every parameter, as a DTensor. LoRA weights are small, so
each process gathers their whole gradients, computes the same step, and writes its own shard. Parameters outside of LoRA
layers may be large, so they and their state stay sharded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes in the default group; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this process; 0 for a single process."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Return whether this is the first process, the one that writes files."""
    return world_size() == 1 or dist.get_rank() == 0


def add_up(tensors: Sequence[Tensor]) -> int:
    """Sum each tensor over all processes, in place, with one all-reduce per dtype.

    Returns:
        the number of processes.
    """
    world = world_size()
    if world > 1:
        for dtype in dict.fromkeys(t.dtype for t in tensors):  # A set would have another order in each process.
            some = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in some])
            dist.all_reduce(flat)
            for t, part in zip(some, torch.split(flat, [t.numel() for t in some]), strict=True):
                t.copy_(part.view_as(t))
    return world


def of_first(value: T) -> T:
    """Return the first process's ``value``, which must be picklable."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def of_all(value: T) -> list[T]:
    """Return the ``value`` of every process, in the order of the processes; values must be picklable."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def copy_first_(tensors: Sequence[Tensor]) -> None:
    """Overwrite each tensor with the first process's, so that rounding cannot make processes differ."""
    for t in tensors if world_size() > 1 else ():
        sent = t.contiguous()  # NCCL requires contiguous tensors
        dist.broadcast(sent, 0)
        if sent is not t:
            t.copy_(sent)


def mean(sum_and_count: tuple[Tensor, Tensor] | None, like: Tensor) -> Tensor:
    """Return ``()`` the mean over all processes: their sums added up, divided by their counts added up.

    Args:
        sum_and_count: two ``()`` tensors; None if this process contributes nothing.
        like: a tensor with the dtype and device of the result.

    Returns:
        the mean; NaN if no process contributes.
    """
    total = like.new_zeros(2) if sum_and_count is None else torch.stack(sum_and_count).to(like)
    add_up([total])
    return total[0] / total[1]


def total(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if world_size() == 1:
        return value
    found = value.clone()
    add_up([found])
    return found


def largest(value: Tensor) -> Tensor:
    """Return the elementwise maximum of a tensor over all processes."""
    if world_size() == 1:
        return value
    found = value.clone()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def everywhere(condition: Tensor | bool, like: Tensor | None = None) -> Tensor:
    """Return ``()`` whether a condition holds in every process.

    Args:
        condition: the condition in this process.
        like: a tensor on the device that the processes communicate through; needed if ``condition`` is a bool.
    """
    device = condition.device if isinstance(condition, Tensor) else None if like is None else like.device
    fails = torch.as_tensor(condition, device=device).logical_not().float()
    add_up([fails])
    return fails == 0


def agree(value: float, like: Tensor) -> bool:
    """Return whether all processes hold the same number; synchronises with the device of ``like``."""
    mine = torch.tensor(value, dtype=torch.float64, device=like.device)
    first = mine.clone()
    copy_first_([first])
    return bool(everywhere(first == mine))


# -- sharded parameters -----------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this process holds one shard."""
    module = sys.modules.get(
        "torch.distributed.tensor"
    )  # not imported here: the import is slow, and without it no DTensor exists
    return module is not None and isinstance(tensor, module.DTensor)


def layout(tensor: Tensor) -> Any:
    """Return mesh and placements of a DTensor; None for other tensors.

    Tensors of equal layout can be stacked before they are gathered.
    """
    return (tensor.device_mesh, tuple(tensor.placements)) if is_sharded(tensor) else None  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard, a view of the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def stack_whole(tensors: Sequence[Tensor]) -> Tensor:
    """Stack L tensors of one shape and layout into a whole ``(L, *shape)`` tensor, with one all-gather if sharded."""
    if not is_sharded(tensors[0]):
        return torch.stack(list(tensors))
    shape = (len(tensors), *tensors[0].shape)
    return _from_parts(torch.stack([local(t) for t in tensors]), tensors[0], shape, 1).full_tensor()  # type: ignore


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; if it is sharded, all processes must call this function."""
    return stack_whole([tensor])[0] if is_sharded(tensor) else tensor


def write_(target: Tensor, value: Tensor) -> None:
    """Overwrite ``target`` in place with a whole ``value``, the same on every process; no communication."""
    local(target).copy_(parts(value.unsqueeze(0), target)[0])


def parts(stacked: Tensor, like: Tensor) -> list[Tensor]:
    """Return this process's shards of L whole tensors ``(L, *shape)``, in the layout of ``like``; no communication."""
    if not is_sharded(like):
        return list(stacked.unbind(0))
    from torch.distributed.tensor import DTensor, Replicate

    mesh, _ = layout(like)
    everywhere_whole = DTensor.from_local(stacked, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return list(everywhere_whole.redistribute(mesh, _placements(like, 1)).to_local().unbind(0))


def as_parts(part: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard as a DTensor in the layout of ``like``, as checkpoints need it; no communication."""
    return _from_parts(part, like, like.shape, 0) if is_sharded(like) else part


def sum_over_parts(value: Tensor, like: Tensor) -> Tensor:
    """Return the sum of ``value`` over the shards of ``like``.

    Args:
        value: this process's term, computed from its shard.
        like: the parameter; if it is not sharded, ``value`` is returned.
    """
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = layout(like)
    terms = [Partial() if p.is_shard() else Replicate() for p in placements]
    return DTensor.from_local(value, mesh, terms, run_check=False).full_tensor()


@contextmanager
def unsynchronized(model: nn.Module) -> Iterator[None]:
    """Return a context in which DistributedDataParallel does not expect the backward pass of a forward pass."""
    kind = torch.nn.parallel.DistributedDataParallel
    with ExitStack() as stack:
        for module in model.modules() if world_size() > 1 else ():
            if isinstance(module, kind):
                stack.enter_context(module.no_sync())
        yield


def fsdp_modules(roots: Iterable[nn.Module]) -> list[Any]:
    """Return the modules below ``roots`` that FSDP2 wraps."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [m for root in roots for m in root.modules() if isinstance(m, kind)]


def reshard(modules: Iterable[Any]) -> None:
    """Drop FSDP2's gathered copies of the parameters, so that the next forward pass gathers current values.

    FSDP2 keeps the outermost module's gathered copy after a forward pass; a parameter update makes this copy stale.
    """
    for module in modules:
        module.reshard()


def _placements(like: Tensor, offset: int) -> list[Any]:
    """Return the placements of ``like``, with every sharded dimension shifted by ``offset``."""
    from torch.distributed.tensor import Shard

    return [Shard(p.dim + offset) if p.is_shard() else p for p in layout(like)[1]]


def _from_parts(part: Tensor, like: Tensor, shape: Sequence[int], offset: int) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(  # type: ignore[no-any-return]
        part, layout(like)[0], _placements(like, offset), run_check=False, shape=torch.Size(shape), stride=stride
    )
