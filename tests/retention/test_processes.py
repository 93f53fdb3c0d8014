"""Retained text in two processes: sums cover both, and sharded models run the same number of passes in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import needs_fsdp2, needs_gloo, spawn
from support import llama_batch, llama_loss, optimizer, tiny_llama
from torch import Tensor

from ctr_optim.retention import Retention, own_samples

pytestmark = needs_gloo


def texts(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (4, 12), generator=generator) for _ in range(count)]


def shard(model: torch.nn.Module) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank: int, folder: Path, sharded: bool) -> Any:
    model = tiny_llama()
    model = shard(model) if sharded else torch.nn.parallel.DistributedDataParallel(model)
    found = Retention.measure(model, texts(3 - rank, rank), rank=4)
    before = model(texts(1, 9)[0]).logits.detach()
    drawn = torch.cat(own_samples(model, 6, 5))
    after = model(texts(1, 9)[0]).logits.detach()
    return found.state_dict(), drawn, torch.equal(before, after)


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=needs_fsdp2)])
def test_both_processes_hold_what_both_have_read(tmp_path: Path, sharded: bool) -> None:
    (one, drawn, kept), (two, drawn_too, kept_too) = spawn(work, tmp_path, sharded)
    expected = Retention.measure(tiny_llama(), [*texts(3, 0), *texts(2, 1)], rank=4)
    assert one["layers"] == two["layers"] == expected.layers
    for (_, a), (_, b), (_, e) in zip(
        one["statistics"].items(), two["statistics"].items(), expected.statistics.items(), strict=True
    ):
        assert a["tokens"] == b["tokens"] == 240
        torch.testing.assert_close(a["values"], e.values)
        assert torch.equal(a["vectors"], b["vectors"])
    assert drawn.shape == drawn_too.shape == (3, 5) and not torch.equal(drawn, drawn_too)
    assert kept and kept_too


def empty_in_one(rank: int, folder: Path) -> str:
    try:
        Retention.measure(tiny_llama(), texts(2, 0) if rank == 0 else [], rank=4)
    except ValueError as error:
        return str(error)
    return ""


def test_an_error_in_one_process_is_raised_in_both(tmp_path: Path) -> None:
    assert all("no batches" in said for said in spawn(empty_in_one, tmp_path))


def trained(rank: int, folder: Path, kind: str) -> Any:
    """Train a fresh adapter for four steps on this process's half of each batch (on whole batches for ``"one"``)."""
    model: Any = tiny_llama()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    if kind != "one":
        model = shard(model) if kind == "fsdp" else torch.nn.parallel.DistributedDataParallel(model)
    text = texts(4, 7)
    opt = optimizer(
        model, lr=0.02, max_kl=1e-2, calibration_interval=None, retain=text if kind == "one" else text[rank::2]
    )
    for step in range(4):
        data = llama_batch(step)
        half = data if kind == "one" else {key: value[2 * rank : 2 * rank + 2] for key, value in data.items()}
        llama_loss(model, half).backward()
        opt.step()
        opt.zero_grad()
    whole = [getattr(pair.A, "full_tensor", lambda p=pair.A: p)().detach() for pair in opt.pairs]
    return whole, opt.state[opt.pairs[0].A]["retain_scales"]


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=needs_fsdp2)])
def test_training_in_two_processes_is_training_in_one(tmp_path: Path, kind: str) -> None:
    expected, scales = trained(0, tmp_path, "one")
    for weights, theirs in spawn(trained, tmp_path, kind):
        torch.testing.assert_close(theirs, scales)
        for mine, other in zip(weights, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
