"""Validation of checkpoints: each missing, unexpected or damaged field raises an error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import (
    finite,
    net,
    optimizer,
    train,
)

RANKS: dict[str, Any] = dict(interval=4, window=2, hysteresis=0.0, absent="sketch")


Refuses = Callable[..., None]


@pytest.fixture
def refused() -> Iterator[Refuses]:
    """A function that asserts that loading a state raises a ValueError and changes nothing."""
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
    """Return a deep copy in which one entry is changed or removed."""
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
        later = ("version", "watched", "credit", "error", "loss_scale", "loss_scale_unit")
        if name not in later:  # checkpoints of earlier versions lack these
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
