"""What processes have to agree on, through torch.distributed; the identity in a single process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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


def mean(sum_and_count: tuple[Tensor, Tensor] | None, like: Tensor) -> float:
    """The mean of a sum over all processes; a process without one contributes nothing. NaN where nobody has one."""
    total = like.new_zeros(2) if sum_and_count is None else torch.stack(sum_and_count).to(like)
    add_up([total])
    value, count = total.tolist()
    return value / count if count > 0 else float("nan")
