"""DistributedDataParallel: two processes on one machine, over gloo."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import needs_gloo, spawn
from support import batch, loss_of, net, same, snapshot, trainable
from torch.nn.parallel import DistributedDataParallel

from ctr_optim import CTROptimizer, RankScheduler
from ctr_optim.report.log import EventLog, read_events
from ctr_optim.runtime import distributed

pytestmark = needs_gloo

STEPS, SHARE = 6, 9  # with nine rows, each process measures the coupling on one row
MOVING: dict[str, Any] = dict(
    resize="masked",
    rank_scheduler=dict(budget=2, interval=2, window=2, sketch_rank=2, hysteresis=0.0, absent="sketch"),
)
OPTIONS: dict[str, Any] = dict(lr=0.05, max_kl=1e-3, factor_interval=2, basis_interval=2, calibration_interval=2)


def rows_of(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return batch(10 * step + rank, n=SHARE)


def joined(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both processes' rows in turn, because the processes measure on the first two rows."""
    (a, la), (b, lb) = rows_of(step, 0), rows_of(step, 1)
    return torch.stack([a, b], 1).flatten(0, 1), torch.stack([la, lb], 1).flatten(0, 1)


def alone(**options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return weights and numbers of the same training in one process."""
    model = net()
    opt = CTROptimizer(trainable(model), **{**OPTIONS, **options}, model=model)
    for step in range(STEPS):
        opt.zero_grad()
        ids, labels = joined(step)
        loss_of(model(ids), labels, options.get("loss_reduction", "mean")).backward()
        opt.step()
    return snapshot(model), opt.metrics()


def _train(
    rank: int, folder: Path, ddp: dict[str, Any], bare: bool, options: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model = net()
    wrapped = DistributedDataParallel(model, **ddp)
    found = {} if bare else {"model": model}
    opt = CTROptimizer(trainable(wrapped), **{**OPTIONS, **options}, **found)
    log = EventLog(opt, folder)
    for step in range(STEPS):
        opt.zero_grad()
        ids, labels = rows_of(step, rank)
        loss_of(wrapped(ids), labels, options.get("loss_reduction", "mean")).backward()
        opt.step()
        log.log()
    return snapshot(model), opt.metrics()


@pytest.mark.parametrize(
    "ddp, bare, options",
    [
        (dict(find_unused_parameters=True), True, {}),
        (dict(), False, {}),
        (dict(static_graph=True), True, dict(max_kl=None)),
        (dict(), True, dict(loss_reduction="sum")),
        (dict(find_unused_parameters=True), True, MOVING),
        (dict(static_graph=True), False, MOVING),
    ],
    ids=["unused", "plain", "static", "sum", "unused-ranks-move", "static-ranks-move"],
)
def test_two_processes_are_one(tmp_path: Path, ddp: dict[str, Any], bare: bool, options: dict[str, Any]) -> None:
    (first, numbers), (second, others) = spawn(_train, tmp_path, ddp, bare, options)
    assert same(first, second) and numbers == others
    weights, expected = alone(**options)
    for name, value in weights.items():  # new rows are only as well conditioned as the sketched gradient
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6 if options is MOVING else 1e-8)
    for name in ("trust/predicted_kl", "trust/scale", "trust/coupling", "kl_from_base"):
        assert numbers[name] == pytest.approx(expected[name], rel=1e-5), name
    assert list(numbers["ranks"].values()) == list(expected["ranks"].values())
    logged = [e for e in read_events(tmp_path) if e["event"] == "log"]
    assert len(logged) == STEPS  # only the first process writes
    assert len({str(e["ranks"]) for e in logged}) > 1 or options is not MOVING


def _accumulate(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    model = net()
    wrapped = DistributedDataParallel(model)
    opt = CTROptimizer(trainable(wrapped), **{**OPTIONS, "calibration_interval": None})
    for step in range(STEPS):
        opt.zero_grad()
        ids, labels = rows_of(step, rank)
        for micro in range(SHARE):
            with wrapped.no_sync() if micro < SHARE - 1 else nullcontext():
                (loss_of(wrapped(ids[micro : micro + 1]), labels[micro : micro + 1]) / SHARE).backward()
        opt.step()
    return snapshot(model)


def test_accumulation_without_synchronising(tmp_path: Path) -> None:
    first, second = spawn(_accumulate, tmp_path)
    assert same(first, second)
    weights, _ = alone(calibration_interval=None)
    for name, value in weights.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-8)


class _Wrapped:
    """An input of a type that only the user's code can copy."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids


class _Picky(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.norm = (
            torch.nn.BatchNorm1d(7).double().requires_grad_(False)
        )  # DDP broadcasts buffers in every forward pass

    def forward(self, ids: Any) -> torch.Tensor:
        return self.net(ids.ids if isinstance(ids, _Wrapped) else ids)


def _one_cannot_rerun(rank: int, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model = _Picky()
    wrapped = DistributedDataParallel(model)
    opt = CTROptimizer(trainable(model.net), **OPTIONS)
    for step in range(STEPS):
        opt.zero_grad()
        ids, labels = rows_of(step, rank)
        loss_of(wrapped(_Wrapped(ids) if rank == 1 and step < 5 else ids), labels).backward()
        opt.step()
        assert (opt.metrics()["trust/source"] == "measured") == (step >= 5)
    return snapshot(model), opt.metrics()


def test_all_measure_or_none(tmp_path: Path) -> None:
    (first, numbers), (second, others) = spawn(_one_cannot_rerun, tmp_path)
    assert same(first, second) and numbers == others


def _adapt(rank: int, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model = net()
    wrapped = DistributedDataParallel(model)
    opt = CTROptimizer(trainable(model), **{**OPTIONS, "kl_schedule": "adaptive", "max_kl": 1e-2})
    for step in range(STEPS):

        def closure(step: int = step) -> torch.Tensor:
            opt.zero_grad()
            ids, labels = rows_of(step, rank)
            loss = loss_of(wrapped(ids), labels)
            loss.backward()
            # The two processes get very different data.
            return loss.detach() * (1 + 50 * rank * (step % 2))

        opt.step(closure)
    return snapshot(model), opt.metrics()


def test_an_adaptive_bound_is_one_bound(tmp_path: Path) -> None:
    (first, numbers), (second, others) = spawn(_adapt, tmp_path)
    assert same(first, second) and numbers == others
    assert numbers["trust/max_kl"] != 1e-2  # the bound changed


def test_what_is_sent_lies_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL accepts only contiguous tensors; gloo accepts any."""

    def broadcast(t: torch.Tensor, source: int) -> None:
        assert t.is_contiguous()
        t.fill_(7)

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    whole = torch.zeros(2, 3)
    distributed.copy_first_([whole[:, 0], whole[:, 1:].T])
    assert (whole == 7).all()


def _disagree(rank: int, folder: Path) -> list[str]:
    errors = []
    for seed, interval in ((rank, 2), (0, 2 + rank)):
        model = net(seed=seed)
        opt = CTROptimizer(trainable(model), **{**OPTIONS, "factor_interval": interval}, model=model)
        loss_of(model(batch()[0]), batch()[1]).backward()
        with pytest.raises(ValueError) as error:
            opt.step()
        errors.append(str(error.value))
    return errors


def test_processes_that_disagree_are_refused(tmp_path: Path) -> None:
    for weights, options in spawn(_disagree, tmp_path):
        assert "other LoRA weights" in weights and "other options" in options


def _move_ranks(rank: int, folder: Path) -> str:
    model = net()
    with pytest.raises(ValueError) as error:
        CTROptimizer(trainable(model), model=model, resize="physical", rank_scheduler=RankScheduler())
    return str(error.value)


def test_new_shapes_are_refused_at_construction(tmp_path: Path) -> None:
    for error in spawn(_move_ranks, tmp_path):
        assert "group of 2 processes" in error and "resize='masked'" in error


def _trainer(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    from accelerate.state import AcceleratorState
    from test_transformers import trainer_of

    AcceleratorState._reset_state(reset_partial_state=True)  # removes the state of tests before the fork
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    trainer = trainer_of(folder, "factory", None, max_steps=4, save_strategy="no", ddp_backend="gloo")
    trainer.train()
    assert trainer.model_wrapped.find_unused_parameters  # the Trainer's default for PEFT models
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_the_trainer_in_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="Hugging Face's Trainer is an extra")
    first, second = spawn(_trainer, tmp_path)
    assert same(first, second)
    logged = [e for e in read_events(tmp_path) if e["event"] == "log"]
    assert [e["step"] for e in logged] == [2, 4] and logged[-1]["trust/source"] == "measured"
