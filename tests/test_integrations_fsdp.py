"""FSDP2 (``fully_shard``): two processes that each hold a part of every parameter, over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import needs_gloo, spawn
from support import llama_batch, llama_loss, tiny_llama, trainable
from torch import Tensor, nn

from ctr_optim import CTROptimizer, distributed

pytest.importorskip("peft", reason="the adapter is PEFT's")
pytestmark = needs_gloo

STEPS, ROWS = 5, 4  # of four rows, a process calibrates on one
OPTIONS: dict[str, Any] = dict(
    lr=0.05, max_kl=1e-3, weight_decay=0.01, factor_interval=2, basis_interval=2, calibration_interval=2
)


def rows_of(step: int, rank: int) -> dict[str, Tensor]:
    return llama_batch(10 * step + rank, n=ROWS)


def joined(step: int) -> dict[str, Tensor]:
    """Both processes' rows, one and one, so that the first two are those that the processes calibrate on."""
    a, b = rows_of(step, 0), rows_of(step, 1)
    return {key: torch.stack([a[key], b[key]], 1).flatten(0, 1) for key in a}


def model_of(**lora: Any) -> nn.Module:
    """LoRA of rank 3, which two processes cannot share evenly, and a head that is trained whole."""
    return tiny_llama(**{"r": 3, "modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"], **lora})


def shard(model: nn.Module, mesh_shape: tuple[int, ...] = (2,), **options: Any) -> nn.Module:
    """Every decoder layer a unit of its own, as usual, and the rest another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, gathered."""
    named = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    return {k: p.full_tensor() if distributed.is_sharded(p) else p for k, p in named.items()}


def train(model: nn.Module, opt: CTROptimizer, data: Any, steps: range) -> None:
    for step in steps:
        llama_loss(model, data(step)).backward()
        opt.step()
        opt.zero_grad()


def alone(**lora: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same training in one process."""
    model = model_of(**lora)
    opt = CTROptimizer(trainable(model), **OPTIONS, model=model)
    train(model, opt, joined, range(STEPS))
    return whole(model), opt.metrics()


def assert_one(first: Any, second: Any, expected: Any) -> None:
    """Both processes alike bit for bit, and equal to one process to rounding."""
    (weights, numbers), (others, other_numbers), (right, right_numbers) = first, second, expected
    assert weights.keys() == right.keys() and numbers == other_numbers
    for name, value in right.items():
        assert torch.equal(weights[name], others[name]), name
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7)
    for name in ("trust/predicted_kl", "trust/scale", "trust/coupling", "kl_from_base"):
        assert numbers[name] == pytest.approx(right_numbers[name], rel=1e-4), name  # from logits in float32


def _train(rank: int, folder: Path, mesh: tuple[int, ...], lora: dict[str, Any]) -> Any:
    model = shard(model_of(**lora), mesh)
    opt = CTROptimizer(model.parameters(), **OPTIONS)
    train(model, opt, lambda step: rows_of(step, rank), range(STEPS))
    return whole(model), opt.metrics()


@pytest.mark.parametrize(
    "mesh, lora", [((2,), {}), ((2,), dict(r=1)), ((2, 1), {})], ids=["uneven", "empty-part", "hsdp"]
)
def test_two_processes_are_one(tmp_path: Path, mesh: tuple[int, ...], lora: dict[str, Any]) -> None:
    assert_one(*spawn(_train, tmp_path, mesh, lora), alone(**lora))
