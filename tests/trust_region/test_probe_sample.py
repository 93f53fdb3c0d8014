"""The sampled tokens shift between measurements, so that every position is sampled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import batch, factors_of, llama_batch, llama_loss, loss_of, net, optimizer, tiny_llama, trainable

from ctr_optim.curvature.capture import sample

OPTIONS: dict[str, Any] = dict(max_kl=None, factor_decay=0.0)


def test_every_position_of_every_row_is_seen_in_turn() -> None:
    """With 128 positions and one token in 16, a fixed phase would always sample 0, 16, ... of every row."""
    seen = torch.zeros(16, 128)
    for step in range(64):
        picked = sample(16 * 128, 16, torch.tensor(step * 0.7548776662 % 1))
        assert len(picked) == 128 and picked.unique().numel() == 128 and picked.diff().gt(0).all()
        seen.view(-1)[picked] += 1
    assert (seen.sum(0) > 0).all() and float((seen > 0).float().mean()) > 0.95
    # Each position is sampled about equally often: 64 times on average.
    assert seen.sum(0).min() > 32 and seen.sum(0).max() < 128


def test_a_last_part_that_is_short_stays_within_the_tokens() -> None:
    for tokens in range(20, 60):
        picked = sample(tokens, 7, torch.tensor(0.99))
        assert int(picked.max()) < tokens and picked.unique().numel() == len(picked)


def test_a_lone_target_at_the_end_of_every_row_is_seen() -> None:
    """With a fixed phase and a stride that divides the row length, the layers never got factors."""
    model = net()
    opt = optimizer(model, max_tokens=32, **OPTIONS)
    for step in range(12):
        opt.zero_grad()
        ids, labels = batch(step, n=16, length=16, ignored=15)
        loss_of(model(ids), labels).backward()
        opt.step()
    assert all(float(f["S"].norm()) > 0 for f in factors_of(opt).values())


def test_micro_batches_of_a_step_and_recomputed_forwards_see_the_same_tokens() -> None:
    found = []
    for checkpointed in (False, True):
        model = tiny_llama()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        opt = optimizer(model, max_tokens=8, **OPTIONS)
        for step in range(3):
            opt.zero_grad()
            llama_loss(model, llama_batch(step)).backward()
            opt.step()
        found.append(factors_of(opt))
    for name, factors in found[0].items():
        for key, value in factors.items():
            torch.testing.assert_close(found[1][name][key], value, rtol=1e-6, atol=1e-12)


def test_a_resumed_run_sees_the_tokens_of_the_whole_one() -> None:
    def run(model: Any, opt: Any, steps: range) -> None:
        for step in steps:
            opt.zero_grad()
            ids, labels = batch(step, n=8)
            loss_of(model(ids), labels).backward()
            opt.step()

    model = net()
    opt = optimizer(model, max_tokens=8, lr=1e-2)
    run(model, opt, range(3))
    state, again = copy.deepcopy(opt.state_dict()), net()
    again.load_state_dict(model.state_dict())
    run(model, opt, range(3, 6))
    resumed = optimizer(again, max_tokens=8, lr=1e-2)
    resumed.load_state_dict(state)
    run(again, resumed, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(trainable(model), trainable(again), strict=True))


@pytest.mark.parametrize("steps", [4])
def test_a_compiled_model_stays_one_graph(steps: int) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    found = []
    counter = CompileCounter()
    for compiled in (False, True):
        model = net()
        opt = optimizer(model, max_tokens=8, **OPTIONS)
        run = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        for step in range(steps):
            opt.zero_grad()
            ids, labels = batch(step, n=8)
            loss_of(run(ids), labels).backward()
            opt.step()
        found.append(factors_of(opt))
    assert counter.frame_count == 1
    for name, factors in found[0].items():
        for key, value in factors.items():
            torch.testing.assert_close(found[1][name][key], value, rtol=1e-9, atol=1e-12)
