"""Unsupported set-ups raise errors that say what to do instead."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from processes import needs_gloo, spawn
from support import backward, batch, loss_of, net, optimizer, same, snapshot, tiny_llama, train, trainable
from torch import nn

from ctr_optim import CTROptimizer, RankScheduler


def test_data_parallel_over_several_devices() -> None:
    model = net()
    wrapped = nn.DataParallel(model)
    CTROptimizer(trainable(wrapped)).close()  # with at most one device, DataParallel only calls the module
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        CTROptimizer(trainable(wrapped))
    assert not any(m._forward_hooks for m in model.modules())


def test_deepspeed_zero_3() -> None:
    model = net()
    for p in trainable(model):
        p.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed ZeRO"):
        optimizer(model)


def test_parameters_replaced_after_construction() -> None:
    model = net()
    opt = optimizer(model)
    train(model, opt, 1)
    flat = nn.Parameter(torch.zeros(7))
    flat.grad = torch.ones(7)
    opt.param_groups[0]["params"] = [flat]
    opt.zero_grad()
    flat.grad = torch.ones(7)
    for p in trainable(model):
        p.grad = None
    with pytest.raises(RuntimeError, match="something replaced them"):
        opt.step()


def test_flat_copies_as_of_deepspeed_zero_1() -> None:
    model = net()
    opt = optimizer(model)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in trainable(model)]))
    opt.param_groups[0]["params"] = [flat]
    backward(model, batch())
    flat.grad = torch.cat([p.grad.flatten() for p in trainable(model)])
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"DeepSpeed ZeRO does.*build the optimizer last"):
        opt.step()


@pytest.mark.parametrize("own", [True, False], ids=["one-each", "shared"])
def test_an_optimizer_in_backward(own: bool) -> None:
    model = net()
    before = snapshot(model)
    shared = None if own else CTROptimizer(trainable(model), model=model)
    for p in trainable(model):
        opt = shared or CTROptimizer([p], model=model)
        p.register_post_accumulate_grad_hook(lambda _, opt=opt: opt.step())
    with pytest.raises(RuntimeError, match=r"within a backward.*after backward"):
        backward(model, batch())
    assert same(before, snapshot(model))


@needs_gloo
def test_fsdp_1(tmp_path: Path) -> None:
    (refused,) = set(spawn(_fsdp_1, tmp_path))
    assert "FSDP1" in refused and "fully_shard" in refused


def _fsdp_1(rank: int, folder: Path) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(net(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError) as caught:
        CTROptimizer(trainable(model), model=model)
    return str(caught.value)


def test_gradients_without_a_forward_that_was_seen() -> None:
    model = net()
    opt = optimizer(model)
    for p in trainable(model):
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=r"saw gradients, but no tokens.*torch\.compiler\.reset"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning comes only once
        opt.step()


def test_an_optimizer_built_after_the_model_was_compiled_and_run() -> None:
    model = net(dtype=torch.float32)
    compiled = torch.compile(model, backend="eager")
    backward(compiled, batch())  # compiles a graph without hooks
    model.zero_grad()
    opt = optimizer(model)
    backward(compiled, batch())
    with pytest.warns(UserWarning, match=r"compiled and run before"):
        opt.step()
    torch.compiler.reset()
    opt.zero_grad()
    backward(compiled, batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    assert opt.metrics()["kl_from_base"] > 0


def test_layers_without_a_gradient_give_no_warning() -> None:
    model = net()
    opt = optimizer(model)
    ids, _ = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (0.0 * model(ids).sum()).backward()
        opt.step()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_moving_ranks_of_adapters_that_change_the_base(start: str) -> None:
    pytest.importorskip("peft", reason="PiSSA and OLoRA are PEFT's")
    model = tiny_llama(dtype=torch.float32, init_lora_weights=start)
    CTROptimizer(trainable(model), model=model).close()  # fixed ranks are supported
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'"):
        CTROptimizer(trainable(model), model=model, rank_scheduler=RankScheduler())
    assert not any(m._forward_hooks for m in model.modules())


def test_another_scheduler_needs_one_to_begin_with() -> None:
    opt = optimizer(net())
    with pytest.raises(ValueError, match="built without one"):
        opt.rank_scheduler = RankScheduler()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is nowhere to move the model to")
def test_a_model_that_is_moved_after_construction() -> None:
    results = []
    for early in (True, False):
        model = net(dtype=torch.float32)
        if early:
            model.cuda()
        opt = CTROptimizer(trainable(model), lr=0.05, max_kl=1e-3, model=model)
        model.cuda()
        ids, labels = (t.cuda() for t in batch())
        for _ in range(3):
            loss_of(model(ids), labels).backward()
            opt.step()
            opt.zero_grad()
        assert opt.metrics()["trust/source"] == "measured"
        results.append(snapshot(model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two devices to spread a model over")
@pytest.mark.parametrize("foreach", [None, True], ids=["kernels", "torch"])
def test_a_model_over_two_devices_trains_as_on_one(foreach: bool | None) -> None:
    results = []
    for second in ("cuda:0", "cuda:1"):
        model = net(dtype=torch.float32, rank=4).to("cuda:0")
        model.down.to(second)
        model.down.register_forward_pre_hook(lambda _, args, device=second: args[0].to(device))
        model.down.register_forward_hook(lambda _, __, out: out.to("cuda:0"))
        scheduler = RankScheduler(interval=4, window=2, sketch_rank=2)
        opt = CTROptimizer(
            trainable(model), lr=0.05, max_kl=1e-3, model=model, foreach=foreach, rank_scheduler=scheduler
        )
        for step in range(8):
            ids, labels = (t.to("cuda:0") for t in batch(step))
            loss_of(model(ids), labels).backward()
            opt.step()
            opt.zero_grad()
        metrics = opt.metrics()
        assert metrics["trust/source"] == "measured" and metrics["kl_from_base"] > 0
        results.append(({k: v.cpu() for k, v in snapshot(model).items()}, opt.ranks))
    assert results[0][1] == results[1][1]
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name], rtol=1e-3, atol=1e-5)


def test_the_state_goes_where_the_model_goes() -> None:
    """The test moves the model to torch's meta device, so it checks shapes and sharing, but no values."""
    model = net(dtype=torch.float32)
    opt = CTROptimizer([*trainable(model), nn.Parameter(torch.zeros(3))], max_kl=1e-3, model=model)
    train(model, opt, 2)
    opt.param_groups[0]["params"][-1].grad = torch.ones(3)
    opt.step()
    shapes = {id(p): {k: v.shape for k, v in opt.state[p].items()} for p in opt.state}
    for p in opt.param_groups[0]["params"]:
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().to("meta")))
    opt._forward_begins((), {})
    for p, state in opt.state.items():
        assert {t.device.type for t in state.values()} == {"meta"}
        assert {k: v.shape for k, v in state.items()} == shapes[id(p)]
    for block in opt.blocks:
        assert {t.device.type for t in (block.H, block.D, *block.C.tensors, *block.S.tensors)} == {"meta"}
        assert block.b is not None and block.b.tensors["rank_input"] is block.H
    assert not any(block.follow_(opt.state) for block in opt.blocks)


@pytest.mark.parametrize("how", ["around a holder", "in place", "of a part", "not at all"])
def test_what_was_compiled_later_keeps_its_shapes(how: str) -> None:
    model = net()
    opt = optimizer(model, rank_scheduler=RankScheduler())
    holder = nn.ModuleDict({"model": model})
    compiled = None
    if how == "around a holder":
        compiled = torch.compile(holder, backend="eager")
    elif how == "in place":
        holder.compile(backend="eager")
    elif how == "of a part":
        compiled = torch.compile(model.up, backend="eager")
    torch.compiler.reset()
    assert not opt._masked()  # no compiled graph exists yet, so shapes may change
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert opt._masked() == (how != "not at all")
    del compiled
