"""Two processes make the same rank events as one process with the whole batch, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import needs_fsdp2, needs_gloo, spawn
from support import llama_batch, loss_of, tiny_llama
from torch import Tensor, nn

from ctr_optim import CTROptimizer, RankEvent

pytestmark = needs_gloo
pytest.importorskip("peft")

STEPS, ROWS = 12, 9  # with nine rows, each process measures the coupling on one row
OPTIONS: dict[str, Any] = dict(
    lr=0.08, max_kl=2e-3, factor_interval=2, basis_interval=2, calibration_interval=4, max_tokens=None, resize="masked",
    rank_scheduler=dict(budget=2, interval=5, window=3, sketch_rank=4, hysteresis=0.0, until=1.0),
)  # fmt: skip


def rows_of(step: int, rank: int) -> dict[str, Tensor]:
    """Return rows of a learnable task, because training on noise amplifies rounding errors."""
    data = llama_batch(100 * step + rank, n=ROWS)
    return {**data, "labels": torch.where(data["labels"] < 0, data["labels"], (3 * data["input_ids"] + 1) % 64)}


def joined(step: int) -> dict[str, Tensor]:
    """Return both processes' rows in turn, because the processes measure on the first two rows."""
    first, second = rows_of(step, 0), rows_of(step, 1)
    return {key: torch.stack([first[key], second[key]], 1).flatten(0, 1) for key in first}


def trained(model: nn.Module, wrapped: nn.Module, data: Any) -> tuple[list[RankEvent], list[float]]:
    opt = CTROptimizer([p for p in wrapped.parameters() if p.requires_grad], model=model, **OPTIONS)
    events: list[RankEvent] = []
    opt.on_rank_event(events.append)
    numbers = []
    for step in range(STEPS):
        batch = data(step)
        opt.zero_grad()
        logits = wrapped(**{k: v for k, v in batch.items() if k != "labels"}).logits
        loss_of(logits, batch["labels"]).backward()
        opt.step()
        numbers += [opt.metrics()["trust/predicted_kl"], opt.metrics()["trust/coupling"]]
    return events, numbers


def _train(rank: int, folder: Path, wrapper: str) -> tuple[list[RankEvent], list[float]]:
    model = tiny_llama(r=4)
    if wrapper == "ddp":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        wrapped = model
        fully_shard(model)
    return trained(model, wrapped, lambda step: rows_of(step, rank))


@pytest.mark.parametrize("wrapper", ["ddp", pytest.param("fsdp2", marks=needs_fsdp2)])
def test_processes_decide_as_one(tmp_path: Path, wrapper: str) -> None:
    model = tiny_llama(r=4)
    events, numbers = trained(model, model, joined)
    for others, same_numbers in spawn(_train, tmp_path, wrapper):
        assert [(e.step, e.name, e.old_rank, e.new_rank, e.kept, e.reason) for e in others] == [
            (e.step, e.name, e.old_rank, e.new_rank, e.kept, e.reason) for e in events
        ]
        assert [e.utility for e in others] == pytest.approx([e.utility for e in events], rel=1e-6)
        assert same_numbers == pytest.approx(numbers, rel=1e-6)
    assert len({e.step for e in events}) == 2 and len({e.new_rank for e in events}) > 1
