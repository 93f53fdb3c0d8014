"""A checkpoint of version 0.1.0 from within a sketch window loads, and training continues to the same weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from support import net, snapshot, train, trainable
from torch import nn

from ctr_optim import CTROptimizer, RankScheduler, load_checkpoint, match_ranks

FILE = Path(__file__).parents[1] / "data" / "checkpoint-0.1.0.pt"


def build(model: nn.Module) -> CTROptimizer:
    ranks = RankScheduler(interval=4, window=2, sketch_rank=3, hysteresis=0.0, absent="sketch")
    return CTROptimizer(trainable(model), max_kl=1e-2, calibration_interval=4, rank_scheduler=ranks)


@pytest.mark.parametrize("first", ["match_ranks", "optimizer"])
def test_a_checkpoint_of_version_0_1_0_continues_to_the_same_weights(first: str) -> None:
    saved, model = load_checkpoint(FILE), net(seed=5, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if first == "match_ranks":
            match_ranks(model, saved["model"])
            model.load_state_dict(saved["model"])
        opt = build(model)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        assert opt.steps == 10
        opt._trust.loss_scale = None  # Version 0.1.0 did not observe it.
        train(model, opt, 6, 10)
    after = snapshot(model)
    assert after.keys() == saved["after"].keys()
    for name, expected in saved["after"].items():
        torch.testing.assert_close(
            after[name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
