"""What goes wrong in a week of training, made to go wrong: nothing is lost, nothing is silent, training goes on."""

from __future__ import annotations

import copy
import math
import os
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    LoRALinear,
    Net,
    assert_factors,
    backward,
    batch,
    factors_of,
    loss_of,
    net,
    optimizer,
    same,
    snapshot,
    train,
    trainable,
    weights_of,
)
from torch.linalg import LinAlgError

from ctr_optim import CTROptimizer, load_checkpoint, save_checkpoint
from ctr_optim.curvature.factors import Dense, LowRank

RANKS: dict[str, Any] = dict(interval=4, window=2, hysteresis=0.0, absent="sketch")


def finite(model: torch.nn.Module) -> bool:
    return all(p.isfinite().all() for p in model.parameters())


def held(opt: CTROptimizer) -> bool:
    """The last step's predicted KL is within its bound."""
    metrics = opt.metrics()
    return metrics["trust/max_kl"] is None or metrics["trust/predicted_kl"] <= metrics["trust/max_kl"] * (1 + 1e-4)


# -- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("structure", ["diagonal", "lowrank", "dense"])
def test_inputs_that_are_not_finite(bad: float, structure: str) -> None:
    model, reference = net(), net()
    opt, other = (optimizer(m, factor_structure=structure, max_kl=1e-3) for m in (model, reference))
    train(model, opt, 3), train(reference, other, 3)
    before = snapshot(model)
    poison = model.embed.register_forward_hook(lambda _m, _a, out: out.index_fill(1, torch.tensor([3]), bad))
    opt.zero_grad()
    backward(model, batch(3))
    poison.remove()
    with pytest.warns(UserWarning, match="skipped a step"):
        opt.step()
    assert same(snapshot(model), before)
    assert_factors(factors_of(opt), factors_of(other), 1e-12)
    train(model, opt, 3, start=4)
    assert finite(model) and held(opt) and not same(snapshot(model), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["rank_input", "rank_output", "input", "output"])
@pytest.mark.parametrize("structure", ["diagonal", "lowrank", "dense"])
def test_a_damaged_factor_stops_the_step_and_begins_anew(structure: str, where: str, bad: float) -> None:
    """A bit that flips in memory: no step whose KL cannot be predicted, and a whole factor again at its next update."""
    model = net(dtype=torch.float32)
    opt = optimizer(model, max_kl=1e-3, factor_interval=4, basis_interval=4, factor_structure=structure)
    train(model, opt, 5)  # factors are updated at steps 0, 1, 2, 4, 8, ...
    state = opt.state[model.up.lora_B.weight]
    names = [where] if where.startswith("rank") else [n for n in state if n.startswith(where)]
    for name in names:
        state[name][0] = bad
    before, moments = snapshot(model), state["exp_avg"].clone()
    train(model, opt, 1, start=5)
    assert same(snapshot(model), before) and opt.metrics()["trust/scale"] == 0.0
    assert not torch.equal(state["exp_avg"], moments)  # what the gradient said is not lost
    train(model, opt, 3, start=6)  # steps 6 and 7, and 8 with an update
    assert not same(snapshot(model), before) and finite(model)
    assert all(t.isfinite().all() for s in opt.state.values() for t in s.values())
    state = opt.state[model.up.lora_B.weight]
    assert state["factor_updates"] == 1 and opt.state[model.down.lora_B.weight]["factor_updates"] == 5
    for step in range(9, 20):
        train(model, opt, 1, start=step)
        assert held(opt) and finite(model)


def test_gradients_that_overflow_when_squared_leave_the_factors_alone() -> None:
    model = net(dtype=torch.float32)
    opt = optimizer(model, max_kl=1e-3)
    train(model, opt, 3)
    before = factors_of(opt)
    opt.zero_grad()
    backward(model, batch(3), weight=1e30)
    assert all(p.grad.isfinite().all() for p in trainable(model))
    opt.step()
    assert_factors(factors_of(opt), before, 1e-12)
    assert finite(model) and held(opt)


# -- decompositions that fail -----------------------------------------------------------------------------------------


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[None]:
    """These functions of torch.linalg do not converge for a while."""

    def fail(*_: Any, **__: Any) -> None:
        raise LinAlgError("linalg.eigh: the algorithm failed to converge")

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(torch.linalg, name, fail)
        yield


def test_a_failed_eigenbasis_is_kept_counted_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    opt = optimizer(model, max_kl=1e-3)
    train(model, opt, 3)
    bases = {p: opt.state[p]["basis"].clone() for p in trainable(model)}
    with failing(monkeypatch, "eigh"), pytest.warns(UserWarning, match="could not decompose an eigenbasis"):
        train(model, opt, 2, start=3)
    assert all(torch.equal(opt.state[p]["basis"], basis) for p, basis in bases.items())
    assert opt.metrics()["failed_decompositions"] == 2 * 4 and held(opt)  # two steps, A and B of two layers
    train(model, opt, 1, start=5)
    assert not any(torch.equal(opt.state[p]["basis"], basis) for p, basis in bases.items())
    assert opt.metrics()["failed_decompositions"] == 8
    _, other = net(), optimizer(net())
    other.load_state_dict(opt.state_dict())
    assert other.metrics()["failed_decompositions"] == 8


def test_a_rank_event_that_fails_changes_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    opt = optimizer(model, rank_scheduler=RANKS)
    heard: list[Any] = []
    opt.on_rank_event(heard.append)
    train(model, opt, 3)
    before = weights_of(opt)
    with failing(monkeypatch, "pinv"), pytest.warns(UserWarning, match="all ranks stay as they are"):
        train(model, opt, 1, start=3)
    assert not heard and opt.metrics()["failed_decompositions"] == 1
    assert all(a.shape == before[n][0].shape for n, (a, _) in weights_of(opt).items())
    assert not any("sketch_range" in opt.state[pair.B] for pair in opt.pairs)
    train(model, opt, 8, start=4)
    assert heard and finite(model)


def test_a_whitener_that_fails_falls_back_to_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5, 5, dtype=torch.float64)
    matrix = x @ x.mT
    with failing(monkeypatch, "eigh"):
        W = Dense(matrix).whitener(0.1)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    expected = (diagonal + 0.1 * diagonal.mean(-1, keepdim=True)).rsqrt()
    torch.testing.assert_close(W, torch.diag_embed(expected))


def test_a_sketch_that_is_not_finite_leaves_the_diagonal() -> None:
    factor = LowRank(*LowRank.sums(torch.randn(9, 6, dtype=torch.float64), torch.float64))
    factor.tensors[0][2, 1] = math.nan
    assert torch.equal(factor.to_dense(), factor.tensors[1].diag())


# -- too little to go on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["diagonal", "lowrank", "dense"])
def test_factors_that_are_all_zero(structure: str) -> None:
    """A model whose loss does not depend on it: gradients are zero, and so is what the factors say."""
    model = net(dtype=torch.float32)
    opt = optimizer(model, rank_scheduler=RANKS, factor_structure=structure, max_kl=1e-3)
    before = snapshot(model)
    for step in range(9):
        opt.zero_grad()
        backward(model, batch(step), weight=0.0)
        opt.step()
    assert finite(model) and held(opt)
    after = snapshot(model)
    assert all(torch.equal(before[k], after[k]) for k in before if "lora" not in k)
    ids = batch()[0]
    reference = net(dtype=torch.float32)
    torch.testing.assert_close(model(ids), reference(ids), rtol=1e-4, atol=1e-5)
    train(model, opt, 6, start=9)
    assert finite(model) and held(opt) and not same(after, snapshot(model))


@pytest.mark.parametrize("structure", ["diagonal", "lowrank", "dense"])
def test_factors_of_rank_one(structure: str) -> None:
    """One token, over and over."""
    model = net(dtype=torch.float32)
    opt = optimizer(model, rank_scheduler=RANKS, factor_structure=structure, max_kl=1e-3)
    data = torch.full((2, 3), 5), torch.full((2, 3), 7)
    first = float(loss_of(model(data[0]), data[1]))
    for _ in range(13):
        opt.zero_grad()
        backward(model, data)
        opt.step()
        assert held(opt) and finite(model)
    assert float(loss_of(model(data[0]), data[1])) < first


def test_a_layer_that_is_never_used() -> None:
    model = net()
    model.spare = LoRALinear(8, 7, 3, 1.0).double()
    opt = optimizer(model, rank_scheduler=RANKS, weight_decay=0.1, max_kl=1e-3)
    before = snapshot(model)
    for step in range(9):
        train(model, opt, 1, step)
        assert held(opt) and finite(model)
    ranks = opt.metrics()["ranks"]
    assert ranks.keys() == {"up", "down", "spare"} and min(ranks.values()) >= 1
    kept = model.spare.lora_B.weight @ model.spare.lora_A.weight
    assert ranks["spare"] < 3 or torch.allclose(kept, before["spare.lora_B.weight"] @ before["spare.lora_A.weight"])
    assert opt.metrics()["kl_from_base/layer"]["spare"] == 0.0
    assert sum(p.A.numel() + p.B.numel() for p in opt.pairs) <= sum(before[k].numel() for k in before if "lora" in k)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_without_a_loss_token(reduction: str) -> None:
    """A mean over nothing is NaN, and the step is skipped; a sum is zero, and the factors know of no new token."""
    model, reference = net(), net()
    opt, other = (optimizer(m, max_kl=1e-3, loss_reduction=reduction) for m in (model, reference))
    for step in range(3):
        for m, o in ((model, opt), (reference, other)):
            o.zero_grad()
            backward(m, batch(step), reduction)
            o.step()
    ids, labels = batch(3)
    for data in ((ids, torch.full_like(labels, -100)), (ids[:0], labels[:0])):
        opt.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backward(model, data, reduction)
            opt.step()
    assert_factors(factors_of(opt), factors_of(other), 1e-12)
    assert finite(model) and held(opt)


# -- loss scaling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clear", ["optimizer", "model", "zeros"])
def test_a_storm_of_overflows_leaves_no_trace(clear: str) -> None:
    """Skipped steps are as if their batches had not been, whoever clears the gradients."""
    model, reference = net(), net()
    opt, other = (optimizer(m, max_kl=1e-3, factor_interval=2) for m in (model, reference))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    step = taken = 0
    while taken < 12:
        storm = step % 7 in (0, 2, 3, 5)
        (opt if clear == "optimizer" else model).zero_grad(set_to_none=clear != "zeros")
        loss = loss_of(model(batch(step)[0]), batch(step)[1])
        scaler.scale(loss).backward()
        if storm:
            model.down.lora_A.weight.grad[0, 0] = math.inf
        scale = scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        assert (scaler.get_scale() < scale) == storm
        if not storm:
            other.zero_grad()
            backward(reference, batch(step))
            other.step()
            taken += 1
        step += 1
        assert held(opt)
    assert opt.steps == other.steps == 12 and opt.metrics()["skipped_steps"] == 0
    assert_factors(factors_of(opt), factors_of(other), 1e-9)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_micro_batches_are_not_mistaken_for_dropped_gradients() -> None:
    """Gradients that are there, also those set to zero, go on being accumulated; so do two forwards of one backward."""
    found = []
    for joint in (False, True):
        model = net()
        opt = optimizer(model)
        losses = [loss_of(model(batch(i)[0]), batch(i)[1]) / 2 for i in range(2)] if joint else []
        for i in range(2):
            (losses[i] if joint else loss_of(model(batch(i)[0]), batch(i)[1]) / 2).backward()
        opt.step()
        found.append(factors_of(opt))
    assert_factors(found[0], found[1], 1e-12)


# -- an optimizer that is closed --------------------------------------------------------------------------------------


def test_a_closed_optimizer_stays_closed() -> None:
    """No hook, no tap armed, no rank event, no complaint: steps with the factors and the ranks that it has."""
    model = net()
    opt = optimizer(model, max_kl=1e-3, calibration_interval=2, rank_scheduler=RANKS)
    train(model, opt, 2)
    opt.close()
    opt.close()
    before, ranks, weights = factors_of(opt), opt.metrics()["ranks"], snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2, 14):
            train(model, opt, 1, step)
            assert not opt._curvature.taps.enabled and held(opt)
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
    assert not any(getattr(m, kind) for m in model.modules() for kind in kinds)
    assert_factors(factors_of(opt), before, 1e-12)
    assert opt.metrics()["ranks"] == ranks and not same(weights, snapshot(model))
    assert not any("sketch_range" in opt.state[pair.B] for pair in opt.pairs)


def test_an_optimizer_closed_before_its_first_step() -> None:
    model = net()
    opt = optimizer(model)
    opt.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, 3)
    assert finite(model)


# -- checkpoint files -------------------------------------------------------------------------------------------------


def run_and_save(path: Path, steps: int) -> tuple[Net, CTROptimizer]:
    model = net()
    opt = optimizer(model, rank_scheduler=RANKS, max_kl=1e-3)
    train(model, opt, steps)
    save_checkpoint(path, {"model": model.state_dict(), "optimizer": opt.state_dict(), "step": steps})
    return model, opt


def resumed(path: Path) -> tuple[Net, CTROptimizer, int]:
    saved = load_checkpoint(path)
    model = net(seed=9)
    opt = optimizer(model, rank_scheduler=RANKS, max_kl=1e-3)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    return model, opt, saved["step"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process: needs os.fork")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_kill_9_in_the_middle_of_a_write(tmp_path: Path, share: float) -> None:
    """Killed when ``share`` of the new file is on the disk: the old one is whole, and training resumes from it."""
    path = tmp_path / "last.pt"
    model, opt = run_and_save(path, 5)
    train(model, opt, 2, start=5)
    pid = os.fork()
    if pid == 0:  # the child
        try:
            write = torch.save

            def dying(value: Any, file: Any) -> None:
                write(value, file)
                file.truncate(int(file.tell() * share))
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = dying
            save_checkpoint(path, {"model": model.state_dict(), "optimizer": opt.state_dict(), "step": 7})
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # what the killed process left lies beside it, under another name
    again, other, step = resumed(path)
    assert step == 5
    train(again, other, 7, start=5)
    train(model, opt, 5, start=7)
    assert same(snapshot(again), snapshot(model))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process: needs os.fork")
def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    """A process that does nothing but save is killed from outside: the file is always one of those it wrote."""
    path = tmp_path / "last.pt"
    for attempt in range(8):
        save_checkpoint(path, {"count": 0, "weight": torch.zeros(20_000)})
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for count in range(1, 100_000):
                    os.write(writer, b".")
                    save_checkpoint(path, {"count": count, "weight": torch.full((20_000,), float(count))})
            finally:
                os._exit(1)
        os.close(writer)
        for _ in range(1 + attempt):
            assert os.read(reader, 1) == b"."
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        found = load_checkpoint(path)
        assert found["count"] >= attempt and (found["weight"] == found["count"]).all()


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    run_and_save(path, 1)
    with pytest.raises((pickle.PicklingError, AttributeError)):  # Python 3.13 and older say it differently
        save_checkpoint(path, {"model": (lambda: None)})
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"] and resumed(path)[2] == 1
    with pytest.raises(FileNotFoundError):
        save_checkpoint(tmp_path / "nowhere" / "last.pt", {})


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.pt"
    run_and_save(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"last\.pt: cannot be loaded"):
        load_checkpoint(path)


def test_a_corrupted_file_is_refused(tmp_path: Path) -> None:
    """One bit of a tensor: the file's own checksums tell."""
    path = tmp_path / "last.pt"
    marker = torch.arange(1000.0)
    save_checkpoint(path, {"weight": marker})
    content = bytearray(path.read_bytes())
    at = content.find(marker.numpy().tobytes())
    content[at + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_checkpoint(path)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "last.pt")


class Hostile:
    """What it says to do when it is loaded would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_hostile_file_runs_nothing(tmp_path: Path) -> None:
    path, trace = tmp_path / "last.pt", tmp_path / "trace"
    torch.save({"optimizer": Hostile(trace)}, path)
    with pytest.raises(ValueError, match="tensors and plain values"):
        load_checkpoint(path)
    assert not trace.exists()


# -- checkpoints, field by field --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    """A state dict in the middle of a sketch window: everything that there can be is in it."""
    model = net(seed=1)
    opt = optimizer(model, rank_scheduler=RANKS, max_kl=1e-3, calibration_interval=2)
    train(model, opt, 3)
    state = opt.state_dict()
    assert "sketch_range" in state["state"][1] and state["param_groups"][0]["ctr"]["coupling"] > 0
    return copy.deepcopy(state)


Refuses = Callable[..., None]


@pytest.fixture
def refused() -> Iterator[Refuses]:
    """Asserts that a state is refused with a ValueError, and that of it nothing is loaded."""
    model = net(seed=2)
    opt = optimizer(model, rank_scheduler=RANKS, max_kl=1e-3, calibration_interval=2)
    train(model, opt, 2)
    before = copy.deepcopy(opt.state_dict())

    def check(state: Any, match: str = "checkpoint: ") -> None:
        with pytest.raises(ValueError, match=match):
            opt.load_state_dict(state)
        after = opt.state_dict()
        assert repr(after["param_groups"]) == repr(before["param_groups"])
        for key, entry in before["state"].items():
            assert entry.keys() == after["state"][key].keys()
            assert all(torch.equal(entry[name], after["state"][key][name]) for name in entry)

    yield check
    train(model, opt, 1, start=2)
    assert finite(model)


def changed(state: Any, *path: Any, value: Any = None, drop: bool = False) -> Any:
    """A deep copy with one thing in it changed, or taken out."""
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return state


def test_the_untouched_state_is_accepted(saved: dict[str, Any]) -> None:
    model = net(seed=2)
    opt = optimizer(model, rank_scheduler=RANKS, max_kl=1e-3, calibration_interval=2)
    opt.load_state_dict(saved)
    assert opt.steps == 3
    train(model, opt, 3, start=3)


@pytest.mark.parametrize("state", [None, 3, [], {}, {"state": {}}, {"state": [], "param_groups": []}], ids=str)
def test_what_is_no_state_dict_is_refused(state: Any, refused: Refuses) -> None:
    refused(state)


def test_every_number_is_checked(saved: dict[str, Any], refused: Refuses) -> None:
    ctr = saved["param_groups"][0]["ctr"]
    assert {"steps", "skipped", "failed", "sketched", "coupling", "max_kl"} <= ctr.keys()
    for name, value in ctr.items():
        for bad in ("3", [3], {}, -1, math.nan, math.inf, True, torch.tensor([1.0, 2.0])):
            refused(changed(saved, "param_groups", 0, "ctr", name, value=bad), f"checkpoint: {name} is")
        if isinstance(value, int):
            refused(changed(saved, "param_groups", 0, "ctr", name, value=1.5), f"checkpoint: {name} is")
            refused(changed(saved, "param_groups", 0, "ctr", name, value=None), f"checkpoint: {name} is")
        if name != "version":  # format 1 had none
            refused(changed(saved, "param_groups", 0, "ctr", name, drop=True), name)
    for bad in (None, 3, [], "ctr"):
        refused(changed(saved, "param_groups", 0, "ctr", value=bad), "another optimizer wrote it")


def test_every_option_of_a_group_is_checked(saved: dict[str, Any], refused: Refuses) -> None:
    group = saved["param_groups"][0]
    for name in ("lr", "betas", "eps", "weight_decay"):
        for bad in ("0.1", None, -1.0, math.nan, [1.0, 2.0, 3.0]):
            refused(changed(saved, "param_groups", 0, name, value=bad), f"checkpoint: {name}")
    for name in ("lr", "betas", "eps", "weight_decay", "maximize", "foreach"):
        refused(changed(saved, "param_groups", 0, name, drop=True), f"without {name}")
    for name in ("peak_lr", "initial_lr"):
        refused(changed(saved, "param_groups", 0, name, value="fast"), f"checkpoint: {name} is")
    for bad in (None, 4, "0123", [0, 1, 2, [3]], [0, 1, 2], [0, 1, 2, 2]):
        refused(changed(saved, "param_groups", 0, "params", value=bad))
    refused({**saved, "param_groups": [3]})
    refused({**saved, "param_groups": [group, group]})


def test_every_tensor_is_checked(saved: dict[str, Any], refused: Refuses) -> None:
    for key, entry in saved["state"].items():
        for name, value in entry.items():
            refused(changed(saved, "state", key, name, drop=True))
            wrong: list[Any] = [None, "tensor", [1.0], value.long(), value.to(torch.complex64)]
            wrong += [torch.zeros(*value.shape, 2), torch.full_like(value, math.nan)]
            if value.dim():
                wrong += [value[:-1], value.to_sparse()]
            if name in ("step", "exp_avg_sq"):
                wrong += [-torch.ones_like(value)]
            for bad in wrong:
                refused(changed(saved, "state", key, name, value=bad))
        refused(changed(saved, "state", key, value=[1, 2]))
        refused(changed(saved, "state", key, "surplus", value=torch.zeros(3)))
        refused(changed(saved, "state", key, drop=True), "is missing in it")
    refused({**saved, "state": {}}, "is missing in it")


@pytest.mark.parametrize("other", [dict(curvature="none"), dict(curvature="gradient"), dict(factor_structure="dense")])
def test_a_state_of_other_options_is_refused(other: dict[str, Any]) -> None:
    for mine, theirs in ((other, {}), ({}, other)):
        one, two = net(), net()
        writer, reader = optimizer(one, **theirs), optimizer(two, **mine)
        train(one, writer, 2)
        with pytest.raises(ValueError, match="build the optimizer with the options that wrote it"):
            reader.load_state_dict(writer.state_dict())
        train(two, reader, 1)
