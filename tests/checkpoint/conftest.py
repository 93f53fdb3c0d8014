"""Fixtures for the checkpoint tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from support import net, optimizer, train

RANKS: dict[str, Any] = dict(interval=4, window=2, hysteresis=0.0, absent="sketch")


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    """A state dict from the middle of a sketch window, so that it has all possible entries."""
    model = net(seed=1)
    opt = optimizer(model, rank_scheduler=RANKS, max_kl=1e-3, calibration_interval=2)
    train(model, opt, 3)
    state = opt.state_dict()
    assert "sketch_range" in state["state"][1] and state["param_groups"][0]["ctr"]["coupling"] > 0
    return copy.deepcopy(state)
