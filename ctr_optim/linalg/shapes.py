"""Truncate and zero-pad tensors, so that layers of different ranks share one batched call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded_rank(rank: int) -> int:
    """Return the rank that ``rank`` is zero-padded to in batched calls: the next power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def sized(x: Tensor, dims: Sequence[int], size: int) -> Tensor:
    """Return ``x`` truncated or zero-padded to ``size`` along each dimension in ``dims``."""
    for dim in dims:
        x = x.narrow(dim, 0, min(size, x.shape[dim]))
        shape = list(x.shape)
        shape[dim] = size - shape[dim]
        x = torch.cat([x, x.new_zeros(shape)], dim) if shape[dim] else x
    return x
