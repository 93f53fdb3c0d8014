"""A custom Accelerate loop: accumulation, clipping, a schedule, rank events, saving and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import llama_batch, same, snapshot, tiny_llama, trainable

from ctr_optim import CTROptimizer, RankScheduler
from ctr_optim.integrations import unwrap

accelerate = pytest.importorskip("accelerate", reason="Accelerate is an extra")
pytest.importorskip("peft", reason="the adapters are PEFT's")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

RANKS = RankScheduler(interval=3, hysteresis=0.0, window=2, sketch_rank=3)


def prepared() -> tuple[Any, ...]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_llama(dtype=torch.float32)
    opt = CTROptimizer(trainable(model), lr=0.02, max_kl=1e-3, calibration_interval=4, rank_scheduler=RANKS)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + 0.1 * step))
    return accelerator, *accelerator.prepare(model, opt, schedule)


def go(accelerator: Any, model: Any, opt: Any, schedule: Any, micro_batches: range) -> None:
    for i in micro_batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**llama_batch(i)).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
            opt.zero_grad()


def test_resuming_after_rank_events_is_exact(tmp_path: Path) -> None:
    whole = prepared()
    events: list[Any] = []
    unwrap(whole[2]).on_rank_event(events.append)
    go(*whole, range(8))
    assert events and unwrap(whole[2]).steps == 4
    whole[0].save_state(str(tmp_path / "state"))
    go(*whole, range(8, 16))

    again = prepared()
    again[0].load_state(str(tmp_path / "state"))
    assert unwrap(again[2]).steps == 4
    go(*again, range(8, 16))
    assert same(snapshot(whole[1]), snapshot(again[1]))
    assert unwrap(whole[2]).metrics() == unwrap(again[2]).metrics()


def test_the_wrapper_comes_off() -> None:
    _, _, opt, _ = prepared()
    assert not isinstance(opt, CTROptimizer) and isinstance(unwrap(opt), CTROptimizer)
    with pytest.raises(TypeError, match="expected a CTROptimizer, got SGD"):
        unwrap(torch.optim.SGD([torch.zeros(1)]))
