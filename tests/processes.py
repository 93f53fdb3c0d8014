"""Run a function in two processes of one machine, over gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
needs_fsdp2 = pytest.mark.skipif(
    not hasattr(getattr(torch.cpu, "Stream", None), "record_event"), reason="this torch cannot run FSDP2 on the CPU"
)


def spawn(work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Return the results of ``work(rank, folder, *args)`` in two processes."""
    mp.start_processes(_enter, (work, folder, args), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _enter(rank: int, work: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.save(work(rank, folder, *args), folder / f"{rank}.pt")
        dist.barrier()  # The first process must not exit while the other still connects.
    finally:
        dist.destroy_process_group()
