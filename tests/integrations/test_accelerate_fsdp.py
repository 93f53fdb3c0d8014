"""Accelerate with FSDP2, which shards the model after the optimizer was built: two processes over gloo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from processes import needs_fsdp2, needs_gloo, spawn
from support import llama_loss, same
from test_fsdp import MOVING, OPTIONS, STEPS, alone, assert_one, model_of, rows_of, whole
from torch import nn

from ctr_optim import CTROptimizer
from ctr_optim.integrations import unwrap

accelerate = pytest.importorskip("accelerate", minversion="1.6", reason="FSDP2 came with Accelerate 1.6")
pytestmark = [
    needs_gloo,
    needs_fsdp2,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.usefixtures("a_token_is_enough"),
]


def accelerator_of(rank: int, **plugin: Any) -> Any:
    """Return the Accelerator of ``accelerate launch`` with ``fsdp_version: 2``, forced to shard on the CPU."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # removes the state of earlier tests
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    accelerator = accelerate.Accelerator(cpu=True)
    for state in (accelerator.state, accelerate.PartialState()):
        state.distributed_type = accelerate.DistributedType.FSDP
    accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        **plugin,
    )
    return accelerator


def prepared(rank: int, *, lora: dict[str, Any], options: dict[str, Any], **plugin: Any) -> tuple[Any, nn.Module, Any]:
    accelerator, model = accelerator_of(rank, **plugin), model_of(**lora)
    return accelerator, *accelerator.prepare(model, CTROptimizer(model.parameters(), **OPTIONS, **options))


def go(accelerator: Any, model: nn.Module, opt: Any, rank: int, steps: range) -> None:
    for step in steps:
        accelerator.backward(llama_loss(model, rows_of(step, rank)))
        opt.step()
        opt.zero_grad()


def _train(rank: int, folder: Path, plugin: dict[str, Any]) -> Any:
    accelerator, model, opt = prepared(rank, lora={}, options={}, **plugin)
    go(accelerator, model, opt, rank, range(STEPS))
    return whole(model), unwrap(opt).metrics()


@pytest.mark.parametrize("plugin", [{}, dict(activation_checkpointing=True)], ids=["plain", "checkpointed"])
def test_two_processes_are_one(tmp_path: Path, plugin: dict[str, Any]) -> None:
    results = spawn(_train, tmp_path, plugin)
    for weights, _ in results:
        for name in list(weights):
            weights[name.replace("_checkpoint_wrapped_module.", "")] = weights.pop(name)
    assert_one(*results, alone())


def _resume(rank: int, folder: Path) -> Any:
    lora, options = dict(r=6), {"rank_scheduler": {**MOVING["rank_scheduler"], "interval": 3, "window": 1}}
    accelerator, model = accelerator_of(rank), model_of(**lora)
    inner = CTROptimizer(model.parameters(), **OPTIONS, **options)
    heard: list[Any] = []
    inner.on_rank_event(heard.append)  # registered before the model is sharded
    model, opt = accelerator.prepare(model, inner)
    go(accelerator, model, opt, rank, range(4))
    accelerator.save_state(str(folder / "state"))
    go(accelerator, model, opt, rank, range(4, STEPS))

    again = prepared(rank, lora=lora, options=options)
    again[0].load_state(str(folder / "state"))
    go(*again, rank, range(4, STEPS))
    return len(heard), (whole(model), inner.metrics()), (whole(again[1]), unwrap(again[2]).metrics())


def test_resuming_after_a_rank_event_is_exact(tmp_path: Path) -> None:
    for heard, (weights, numbers), (others, other_numbers) in spawn(_resume, tmp_path):
        assert heard > 0 and same(weights, others)
        for told in (numbers, other_numbers):
            told.pop("utility")  # the second run resumes after the event, so it has no utility
        assert numbers == other_numbers


def _late(rank: int, folder: Path) -> str:
    accelerator, model = accelerator_of(rank), model_of()
    opt = CTROptimizer(model.parameters(), **OPTIONS)
    llama_loss(model, rows_of(0, rank)).backward()
    opt.step()
    opt.zero_grad()
    model, opt = accelerator.prepare(model, opt)
    accelerator.backward(llama_loss(model, rows_of(1, rank)))
    with pytest.raises(RuntimeError) as caught:
        opt.step()
    return str(caught.value)


def test_an_optimizer_that_has_been_training_cannot_follow(tmp_path: Path) -> None:
    for error in spawn(_late, tmp_path):
        assert "accelerator.prepare" in error and "only before the optimizer's first step" in error
