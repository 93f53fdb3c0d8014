"""Masked ranks, which move within the allocated shapes: equal training, no recompilation, equal processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import spawn
from support import (
    batch,
    llama_batch,
    llama_loss,
    loss_of,
    needs_newer_compiler,
    net,
    relative_error,
    same,
    snapshot,
    tiny_llama,
    trainable,
)
from torch import nn

from ctr_optim import CTROptimizer
from ctr_optim.linalg.eigen import eigenbasis
from ctr_optim.model.pair import ranks_in_use

ROOM = 8
RANKS: dict[str, Any] = dict(budget=4, interval=3, window=2, sketch_rank=4, hysteresis=0.0, max_change=3)
OPTIONS: dict[str, Any] = dict(
    lr=0.05, weight_decay=0.1, max_kl=1e-3, factor_interval=2, basis_interval=2, calibration_interval=5
)


def build(model: nn.Module, resize: str = "masked", **ranks: Any) -> CTROptimizer:
    return CTROptimizer(trainable(model), resize=resize, rank_scheduler={**RANKS, "max_rank": ROOM, **ranks}, **OPTIONS)


def go(model: nn.Module, opt: CTROptimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        llama_loss(model, llama_batch(step)).backward()
        opt.step()


@pytest.mark.parametrize("min_rank", [1, 0])
def test_masked_is_physical_to_rounding(min_rank: int) -> None:
    """Masked and physical ranks agree in float64 over six events: ranks, events, outputs, moments and constraint."""
    runs: dict[str, Any] = {}
    for resize in ("physical", "masked"):
        model = tiny_llama(torch.float64, r=ROOM, lora_alpha=16)
        opt = build(model, resize, min_rank=min_rank, max_change=8 if min_rank == 0 else 3)
        heard: list[Any] = []
        opt.on_rank_event(heard.append)
        go(model, opt, range(19))
        runs[resize] = model, opt, heard
    (one, physical, events), (other, masked, others) = runs["physical"], runs["masked"]
    assert len({e.step for e in events}) >= 4
    known = ("step", "name", "old_rank", "new_rank", "kept", "reason")
    assert [[getattr(e, k) for k in known] for e in events] == [[getattr(e, k) for k in known] for e in others]
    assert any(e.reason == "grow" for e in events) and any(e.new_rank == min_rank for e in events)
    assert physical.metrics()["ranks"] == masked.metrics()["ranks"]
    for p, q in zip(physical.pairs, masked.pairs, strict=True):
        assert relative_error((q.B @ q.A).detach(), (p.B @ p.A).detach()) < 1e-6 or min_rank == 0 == float(p.B.norm())
    for key in ("trust/predicted_kl", "trust/coupling", "kl_from_base"):
        assert masked.metrics()[key] == pytest.approx(physical.metrics()[key], rel=1e-6), key
    data = llama_batch(77)["input_ids"]
    # Directions of small utility lose half of their digits in float64 Gram matrices.
    assert relative_error(other(input_ids=data).logits, one(input_ids=data).logits) < 1e-6


def test_a_layer_that_was_dropped_comes_back() -> None:
    """A small budget empties most layers; with a larger budget, directions of the sketch fill them again."""
    model = tiny_llama(torch.float64, r=ROOM)
    opt = build(model, min_rank=0, max_change=None, budget=0.2)
    go(model, opt, range(4))
    dropped = {name for name, rank in opt.metrics()["ranks"].items() if rank == 0}
    assert dropped and all(float(p.B.detach().abs().sum()) == 0 for p in opt.pairs if p.name in dropped)
    opt.rank_scheduler = replace(opt.rank_scheduler, budget=4)
    data = llama_batch(50)["input_ids"]
    go(model, opt, range(4, 5))
    before = model(input_ids=data).logits
    opt.param_groups[0]["lr"] = 0.0
    go(model, opt, range(5, 6))
    assert relative_error(model(input_ids=data).logits.detach(), before.detach()) < 1e-6  # growth keeps the outputs
    opt.param_groups[0]["lr"] = 0.05
    ranks = opt.metrics()["ranks"]
    assert any(ranks[name] > 0 for name in dropped)
    go(model, opt, range(6, 8))
    back = [pair for pair in opt.pairs if pair.name in dropped and ranks[pair.name]]
    assert all(float(pair.B.detach().abs().sum()) > 0 for pair in back)
    assert all(0 < pair.A.detach().norm() < 10 * ROOM**0.5 for pair in back)


def test_directions_not_in_use_are_zero_exactly() -> None:
    model = tiny_llama(torch.float32, r=ROOM)
    opt = build(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    go(model, opt, range(8))
    ranks = opt.metrics()["ranks"]
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert 1 <= min(ranks.values()) < max(ranks.values()) <= ROOM
    assert sum(ranks[p.name] * p.cost for p in opt.pairs) <= 4 * sum(p.cost for p in opt.pairs)
    for pair in opt.pairs:
        k = ranks[pair.name]
        state_a, state_b = opt.state[pair.A], opt.state[pair.B]
        rows = (pair.A, pair.A.grad, state_a["exp_avg"], state_a["exp_avg_sq"])
        columns = (pair.B, pair.B.grad, state_b["exp_avg"], state_b["exp_avg_sq"])
        idle = [t[k:] for t in rows] + [t[:, k:] for t in columns]
        idle += [state_b[name][k:] for name in ("rank_input", "rank_output")]
        assert all(t.count_nonzero() == 0 for t in idle)
        for basis in (state_a["basis"], state_b["basis"]):
            assert torch.equal(basis[k:], torch.eye(ROOM)[k:]) and torch.equal(basis[:, k:], torch.eye(ROOM)[:, k:])


def test_eigenbasis_keeps_what_it_knows_nothing_of_apart() -> None:
    known = torch.randn(2, 3, 9).double()
    matrix = torch.zeros(2, 6, 6).double()
    matrix[0, :3, :3] = known[0] @ known[0].mT
    matrix[1][torch.tensor([[0], [2], [3]]), torch.tensor([0, 2, 3])] = known[1] @ known[1].mT
    basis = eigenbasis(matrix, torch.zeros(2, 6, 6).double())
    torch.testing.assert_close(basis.mT @ basis, torch.eye(6).double().expand(2, 6, 6))
    turned = basis.mT @ matrix @ basis
    torch.testing.assert_close(turned, torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1)))
    assert torch.equal(basis[0, 3:], torch.eye(6).double()[3:])
    assert torch.equal(basis[1, [1, 4, 5]], torch.eye(6).double()[3:])
    assert torch.equal(eigenbasis(0 * matrix, basis), torch.eye(6).double().expand(2, 6, 6))


@pytest.mark.parametrize("stop", [6, 8])  # directly after an event; inside a sketch window
def test_resuming_is_exact_and_ranks_are_read_off_the_weights(stop: int) -> None:
    model = tiny_llama(torch.float32, r=ROOM)
    opt = build(model)
    go(model, opt, range(stop))
    fresh = tiny_llama(torch.float32, seed=5, r=ROOM)
    other = build(fresh)
    assert set(other.metrics()["ranks"].values()) == {ROOM}
    fresh.load_state_dict(model.state_dict())
    assert other.metrics()["ranks"] == opt.metrics()["ranks"]
    other.load_state_dict(opt.state_dict())
    go(model, opt, range(stop, 13))
    go(fresh, other, range(stop, 13))
    assert same(snapshot(model), snapshot(fresh)) and opt.metrics() == other.metrics()


def test_weights_of_fewer_directions_load_into_the_room_there_is() -> None:
    small, model = net(rank=2), net(seed=3, rank=5)
    opt = CTROptimizer(trainable(model), model=model, resize="masked", rank_scheduler={"budget": 3})
    model.load_state_dict(small.state_dict())
    assert opt.metrics()["ranks"] == {"up": 2, "down": 2} and opt.pairs[0].rank == 5
    ids = batch()[0]
    assert relative_error(model(ids), small(ids)) < 1e-12
    with pytest.raises(RuntimeError, match="keeps its 5 directions"):
        model.load_state_dict(net(rank=6).state_dict())


def test_a_full_allocation_is_told_once_and_room_is_never_exceeded() -> None:
    model = tiny_llama(torch.float32, r=3)
    opt = build(model, budget=None)
    with pytest.warns(UserWarning, match="larger r"):
        go(model, opt, range(4))
    assert set(opt.metrics()["ranks"].values()) == {3}
    with pytest.raises(ValueError, match="that was allocated"):
        opt.pairs[0].fill(torch.zeros(4, 32), torch.zeros(32, 4))


@needs_newer_compiler
def test_a_compiled_model_is_not_compiled_again_at_events() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = net(rank=6, dtype=torch.float32)
    opt = CTROptimizer(trainable(model), model=model, rank_scheduler={**RANKS, "absent": "sketch"}, **OPTIONS)
    events: list[Any] = []
    opt.on_rank_event(events.append)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    graphs = []
    for step in range(14):
        opt.zero_grad()
        ids, labels = batch(step)
        loss_of(compiled(ids), labels).backward()
        opt.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert {pair.rank for pair in opt.pairs} == {6} and {9, 12} <= {event.step for event in events}
    # The graphs with and without hooks and sketches compile once each; the events after steps 9 and 12 add none.
    assert graphs[-1] == graphs[8], graphs
    torch.compiler.reset()


def _train(rank: int, folder: Path, resize: str) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    model = net(rank=6)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    opt = CTROptimizer(
        trainable(wrapped), model=model, resize=resize, rank_scheduler={**RANKS, "budget": 3, "min_rank": 1}, **OPTIONS
    )
    events: list[Any] = []
    opt.on_rank_event(events.append)
    for step in range(10):
        opt.zero_grad()
        ids, labels = batch(10 * step + rank)
        loss_of(wrapped(ids), labels).backward()
        opt.step()
    return snapshot(model), opt.metrics(), events


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("resize", ["auto", "masked"])
def test_processes_stay_alike(tmp_path: Path, resize: str) -> None:
    (first, numbers, events), (second, others, same_events) = spawn(_train, tmp_path, resize)
    assert same(first, second) and numbers == others and events == same_events
    assert len({e.step for e in events}) > 1
    assert sum(numbers["ranks"].values()) <= 6 and first["up.lora_A.weight"].shape == (6, 8)


def test_ranks_in_use_are_counted_from_the_weights() -> None:
    model = net(rank=4)
    opt = CTROptimizer(trainable(model), model=model)
    with torch.no_grad():
        model.up.lora_A.weight[1:] = 0
        model.up.lora_B.weight[:, 3:] = 0  # column 2 of B stays nonzero, but its row of A is zero
        model.down.lora_A.weight.zero_()
        model.down.lora_B.weight.zero_()
    assert ranks_in_use(opt.pairs) == [3, 0] and ranks_in_use([]) == []
