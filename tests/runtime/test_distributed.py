"""Communication between processes, without processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctr_optim.runtime import distributed


def test_sums_over_processes_have_the_order_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes must reduce the same dtype first; the order of a set of dtypes differs between processes."""
    reduced: list[Tensor] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda t: reduced.append(t.mul_(2).clone()))
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.float16, torch.int32]
    for order in (dtypes, dtypes[::-1]):
        reduced.clear()
        tensors = [torch.full((2, 3), index).to(dtype) for index, dtype in enumerate([*order, *order])]
        assert distributed.add_up(tensors) == 2
        assert [t.dtype for t in reduced] == order
        for index, t in enumerate(tensors):
            assert torch.equal(t, torch.full((2, 3), 2 * index).to(t.dtype))
