"""Moving ranks during training: KL bound, budget, checkpoints, and initial directions."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    llama_batch,
    llama_loss,
    lora_layers,
    loss_of,
    net,
    optimizer,
    relative_error,
    same,
    snapshot,
    tiny_llama,
    train,
    trainable,
    weights_of,
)
from torch import nn

from ctr_optim import CTROptimizer, RankEvent, RankScheduler, initialize, match_ranks

RANKS: dict[str, Any] = dict(interval=4, window=2, sketch_rank=3, hysteresis=0.0, until=1.0)
OPTIONS: dict[str, Any] = dict(
    lr=0.05, weight_decay=0.1, max_kl=1e-3, factor_interval=3, basis_interval=4, calibration_interval=5
)


def llama(seed: int = 0) -> nn.Module:
    return tiny_llama(torch.float32, seed)


def build(model: nn.Module, **ranks: Any) -> CTROptimizer:
    return CTROptimizer(trainable(model), rank_scheduler={**RANKS, **ranks}, **OPTIONS)


def go(model: nn.Module, opt: CTROptimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        llama_loss(model, llama_batch(step)).backward()
        opt.step()


def through_disk(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def parameters_of(opt: CTROptimizer) -> int:
    return sum(pair.A.numel() + pair.B.numel() for pair in opt.pairs)


# -- the run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["spectrum", "sketch"])
def test_constraint_and_budget_hold_through_events(absent: str) -> None:
    model = llama()
    opt = build(model, absent=absent, min_rank=2, max_rank=7)
    budget, heard = parameters_of(opt), []
    opt.on_rank_event(heard.append)
    handles = {id(p) for p in trainable(model)}
    ranks = dict(opt.metrics()["ranks"])
    assert set(ranks.values()) == {4} and opt.metrics()["utility"] == {}
    moved = 0
    for step in range(14):
        before = weights_of(opt)
        go(model, opt, range(step, step + 1))
        metrics = opt.metrics()
        assert 0 < metrics["trust/predicted_kl"] <= metrics["trust/max_kl"] * (1 + 1e-5)
        assert parameters_of(opt) <= budget
        events = [e for e in heard if e.step == step + 1]
        assert not events or (step + 1) % 4 == 0
        assert [e.name for e in events] == sorted({e.name for e in events})
        for event in events:
            assert event.old_rank == ranks[event.name] and 0 <= event.kept <= min(event.old_rank, event.new_rank)
            assert abs(event.new_rank - event.old_rank) <= 2 and 2 <= event.new_rank <= 7
            sign = (event.new_rank > event.old_rank) - (event.new_rank < event.old_rank)
            assert event.reason == {1: "grow", 0: "turn", -1: "shrink"}[sign]
            assert event.as_dict()["new_rank"] == event.new_rank and math.isfinite(event.utility)
            ranks[event.name] = event.new_rank
            moved += sign != 0
        assert metrics["ranks"] == ranks == {pair.name: pair.rank for pair in opt.pairs}
        changed = {e.name for e in events}
        assert all(before[n][0].shape == a.shape for n, (a, _) in weights_of(opt).items() if n not in changed)
        if step >= 3:
            assert metrics["utility"].keys() == ranks.keys() and all(u >= 0 for u in metrics["utility"].values())
    assert moved > 3
    assert handles == {id(p) for p in trainable(model)}


def test_what_an_event_leaves_unspent_is_not_lost() -> None:
    """With layers of unequal cost, the budget stays the initial one after any number of events."""
    model = llama()
    opt = build(model, interval=2)
    start = parameters_of(opt)
    spent = []
    for step in range(16):
        go(model, opt, range(step, step + 1))
        spent.append(parameters_of(opt))
    dearest = max(pair.cost for pair in opt.pairs)
    assert max(spent) <= start and spent[-1] > start - dearest


def test_a_config_file_can_hold_the_scheduler() -> None:
    one, other = net(), net()
    opts = [optimizer(one, rank_scheduler=dict(RANKS)), optimizer(other, rank_scheduler=RankScheduler(**RANKS))]
    for model, opt in zip((one, other), opts, strict=True):
        train(model, opt, 9)
    assert same(snapshot(one), snapshot(other))
    with pytest.raises(TypeError, match="rank_scheduler: got int"):
        optimizer(net(), rank_scheduler=3)
    with pytest.raises(TypeError, match="intervall"):
        optimizer(net(), rank_scheduler={"intervall": 3})


def test_without_a_scheduler_or_layers_there_are_no_events() -> None:
    with pytest.raises(ValueError, match="no rank_scheduler"):
        optimizer(net()).on_rank_event(print)
    plain = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="rank_scheduler"):
        CTROptimizer(plain.parameters(), rank_scheduler={})
    with pytest.raises(ValueError, match="rank_scheduler"):
        optimizer(net(), curvature="none", rank_scheduler={})
    two = [net(0), net(1)]
    with pytest.raises(ValueError, match="several layers are named"):
        CTROptimizer([p for m in two for p in trainable(m)], rank_scheduler={})


def test_ranks_beyond_what_a_layer_can_use_come_down() -> None:
    model = net(rank=9)  # up is (10, 8), down is (7, 10)
    opt = optimizer(model, rank_scheduler=RANKS, lr=1e-3)
    before = model.up.lora_B.weight @ model.up.lora_A.weight
    train(model, opt, 4)
    assert opt.metrics()["ranks"]["up"] <= 8 and opt.metrics()["ranks"]["down"] <= 7
    assert relative_error((model.up.lora_B.weight @ model.up.lora_A.weight).detach(), before.detach()) < 0.2


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [5, 7, 8])  # between two events; inside a sketch window; directly after an event
@pytest.mark.parametrize("late", [False, True])
def test_resuming_across_events_is_exact(stop: int, late: bool) -> None:
    """With ``late``, the optimizer is built after the weights are loaded; else the model's load resizes the layers."""
    model = llama()
    opt = build(model)
    go(model, opt, range(stop))
    assert ("sketch_range" in opt.state[opt.pairs[0].B]) == (stop == 7)
    saved = through_disk({"model": model.state_dict(), "optimizer": opt.state_dict()})
    ranks = opt.metrics()["ranks"]
    fresh = llama(seed=7)
    if late:
        changed = match_ranks(fresh, saved["model"])
        assert changed == {n: r for n, r in ranks.items() if r != 4} != {}
        fresh.load_state_dict(saved["model"])
        other = build(fresh)
    else:
        other = build(fresh)
        fresh.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert other.metrics()["ranks"] == ranks
    events: tuple[list[RankEvent], list[RankEvent]] = ([], [])
    for optimizer_, heard in zip((opt, other), events, strict=True):
        optimizer_.on_rank_event(heard.append)
    go(model, opt, range(stop, 14))
    go(fresh, other, range(stop, 14))
    assert events[0] == events[1] and events[0]
    assert same(snapshot(model), snapshot(fresh))
    assert opt.metrics() == other.metrics()


def test_going_back_to_an_old_checkpoint_inside_a_sketch_window() -> None:
    """Loading one layer of another rank inside a sketch window restarts the sketches of all layers."""
    model = net(rank=3)
    opt = optimizer(model, rank_scheduler=RANKS)
    train(model, opt, 3)
    other = net(seed=5, rank=3)
    weights = other.state_dict()
    weights["down.lora_A.weight"] = torch.randn(2, 10).double()
    weights["down.lora_B.weight"] = torch.randn(7, 2).double()
    model.load_state_dict(weights)
    assert opt.metrics()["ranks"] == {"up": 3, "down": 2}
    train(model, opt, 6, start=3)
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_optimizer_that_is_closed_leaves_loading_alone() -> None:
    model = net(rank=3)
    opt = optimizer(model, rank_scheduler=RANKS)
    opt.close()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(net(rank=2).state_dict())


def test_match_ranks_reads_files_and_wrappers(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32, rank_pattern={"q_proj": 2, "down_proj": 6})
    expected = {n: r for n, r in _ranks(model).items() if r != 4}
    model.save_pretrained(tmp_path / "adapter")
    torch.save(model.state_dict(), tmp_path / "model.bin")
    wrapped = {f"module.{k}": v for k, v in model.state_dict().items()}
    compiled = {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}
    for source in (tmp_path / "adapter", str(tmp_path / "model.bin"), model.state_dict(), wrapped, compiled):
        fresh = llama(seed=3)
        assert match_ranks(fresh, source) == expected
        assert match_ranks(fresh, source) == {}
        fresh.load_state_dict(model.state_dict())
    with pytest.raises(FileNotFoundError, match="match_ranks"):
        match_ranks(model, tmp_path)
    with pytest.raises(ValueError, match="another model"):
        match_ranks(model, net().state_dict())


def _ranks(model: nn.Module) -> dict[str, int]:
    from ctr_optim.model.registry import find_pairs

    return {pair.name: pair.rank for pair in find_pairs(model)}


# -- initialize -------------------------------------------------------------------------------------------------------


def fresh_llama(**lora: Any) -> nn.Module:
    return tiny_llama(torch.float32, init_lora_weights=True, **lora)


def llama_loss_fn(model: nn.Module, data: Any) -> torch.Tensor:
    return llama_loss(model, data)


@pytest.mark.parametrize("structure", ["diagonal", "dense", "lowrank"])
@pytest.mark.parametrize("move_ranks", [True, False])
def test_initialize_leaves_the_function_alone(structure: str, move_ranks: bool) -> None:
    model = fresh_llama()
    data = llama_batch()
    before = model(input_ids=data["input_ids"]).logits.detach()
    weights, ranks = snapshot(model), _ranks(model)
    costs = {n: a.shape[1] + b.shape[0] for n, (a, b) in weights_of(CTROptimizer(trainable(model))).items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    events = initialize(
        model, [llama_batch(i) for i in range(3)], loss_fn=llama_loss_fn, factor_structure=structure,
        move_ranks=move_ranks,
    )  # fmt: skip
    assert torch.equal(model(input_ids=data["input_ids"]).logits, before)
    assert all(p.grad is None for p in model.parameters())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not any(m._load_state_dict_pre_hooks for m in model.modules())
    new = _ranks(model)
    assert {e.name: e.new_rank for e in events} == new and all(e.kept == 0 and e.step == 0 for e in events)
    assert sum(new[n] * c for n, c in costs.items()) <= sum(ranks[n] * c for n, c in costs.items())
    assert (new != ranks) == move_ranks
    after = snapshot(model)
    assert all(torch.equal(after[k], weights[k]) for k in weights if "lora_" not in k)
    assert not any(torch.equal(after[k], weights[k]) for k in weights if "lora_A" in k)


def test_start_directions_are_those_in_which_the_loss_falls_fastest() -> None:
    """With large damping, A's rows are the leading right singular vectors of the plain gradient."""
    model = net(b_std=0.0)
    data = [torch.randint(0, 11, (4, 6)) for _ in range(2)]

    def loss(m: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return loss_of(m(ids), ids.roll(1, -1))

    grads = {n: 0 for n in lora_layers(model)}
    for ids in data:
        layers = lora_layers(model)
        for layer in layers.values():
            layer.base.weight.requires_grad_(True)
        found = torch.autograd.grad(loss(model, ids), [layer.base.weight for layer in layers.values()])
        grads = {n: grads[n] + g for n, g in zip(layers, found, strict=True)}
        for layer in layers.values():
            layer.base.weight.requires_grad_(False)
    initialize(model, data, loss_fn=loss, damping=1e6, move_ranks=False)
    for name, layer in lora_layers(model).items():
        v = torch.linalg.svd(grads[name])[2][:3]
        rows = layer.lora_A.weight.detach()
        rows = rows / rows.norm(dim=-1, keepdim=True)
        torch.testing.assert_close((rows * v).sum(-1).abs(), torch.ones(3).double(), rtol=1e-3, atol=1e-3)


def test_initialize_within_a_budget_and_with_models_that_return_their_loss() -> None:
    model = fresh_llama()
    batches = [{k: v for k, v in llama_batch(i).items() if k in ("input_ids", "labels")} for i in range(2)]
    initialize(model, iter(batches), budget=2, max_rank=5)
    ranks = _ranks(model)
    assert max(ranks.values()) <= 5 and min(ranks.values()) >= 1
    opt = CTROptimizer(trainable(model))
    assert parameters_of(opt) <= 2 * sum(pair.cost for pair in opt.pairs)


def test_initialize_says_what_is_wrong() -> None:
    batches = [llama_batch()]
    with pytest.raises(ValueError, match="no batches"):
        initialize(fresh_llama(), [])
    with pytest.raises(ValueError, match="B = 0"):
        initialize(llama(), batches, loss_fn=llama_loss_fn)
    with pytest.raises(TypeError, match="loss_fn"):
        initialize(fresh_llama(), [batches[0]["input_ids"]])
    with pytest.raises(ValueError, match="budget"):
        initialize(fresh_llama(), batches, budget=1, min_rank=2, loss_fn=llama_loss_fn)
    with pytest.raises(ValueError, match="none at all"):
        initialize(nn.Linear(3, 3), batches, loss_fn=llama_loss_fn)


def test_ranks_move_where_only_b_is_trained() -> None:
    """A frozen A is resized with B, and has no optimizer state."""
    model = net()
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(False)
    opt = optimizer(model, rank_scheduler={**RANKS, "absent": "sketch"})
    heard: list[RankEvent] = []
    opt.on_rank_event(heard.append)
    train(model, opt, 5)
    assert heard and all(pair.A.shape[0] == pair.B.shape[1] for pair in opt.pairs)
    state = opt.state_dict()
    assert len(state["state"]) == 2
    opt.load_state_dict(through_disk(state))
    train(model, opt, 4, start=5)
    assert all(p.isfinite().all() for p in model.parameters())


def test_listeners_and_metrics_outlive_a_new_group() -> None:
    model = net()
    *some, last = trainable(model)
    opt = CTROptimizer(some, lr=0.05, model=model, rank_scheduler=RankScheduler(budget=2, **{**RANKS, "interval": 2}))
    heard: list[RankEvent] = []
    opt.on_rank_event(heard.append)
    train(model, opt, 1)
    told = opt.metrics()["trust/max_kl"]
    opt.add_param_group({"params": [last]})
    assert told is not None and opt.metrics()["trust/max_kl"] == told
    train(model, opt, 4)
    assert heard
