"""Optimizers that wrap another optimizer: Lookahead of two libraries."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from support import backward, batch, net, same, snapshot, train, trainable
from torch import Tensor, nn

from ctr_optim import CTROptimizer, RankScheduler

STEPS, K, ALPHA = 7, 3, 0.4
OPTIONS: dict[str, Any] = dict(lr=0.05, max_kl=1e-2, factor_interval=1, basis_interval=2, calibration_interval=2)


def lookahead(library: str, opt: CTROptimizer) -> Any:
    module = pytest.importorskip(library, reason="its Lookahead is what is tested")
    return module.Lookahead(opt, k=K, alpha=ALPHA)


def by_hand() -> dict[str, Tensor]:
    """Return weights of a reference Lookahead (arXiv 1907.08610): every K steps, interpolate to slow weights."""
    model = net()
    opt = CTROptimizer(trainable(model), **OPTIONS, model=model)
    slow = [p.detach().clone() for p in trainable(model)]
    for step in range(STEPS):
        train(model, opt, 1, start=step)
        if (step + 1) % K == 0:
            with torch.no_grad():
                for p, s in zip(trainable(model), slow, strict=True):
                    s += ALPHA * (p - s)
                    p.copy_(s)
    return snapshot(model)


@pytest.mark.parametrize("library", ["pytorch_optimizer", "torch_optimizer"])
def test_lookahead_is_lookahead(library: str) -> None:
    model = net()
    opt = lookahead(library, CTROptimizer(trainable(model), **OPTIONS, model=model))
    if library == "torch_optimizer":  # it copies its slow weights after the first step; the reference copies before
        for p in trainable(model):
            opt.state[p]["slow_param"] = p.detach().clone()
        opt.param_groups[0]["counter"] = 1
    train(model, opt, STEPS)
    for name, value in by_hand().items():
        torch.testing.assert_close(snapshot(model)[name], value)


def test_lookahead_resumes_exactly() -> None:
    def build() -> tuple[nn.Module, Any]:
        model = net()
        return model, lookahead("pytorch_optimizer", CTROptimizer(trainable(model), **OPTIONS, model=model))

    model, opt = build()
    train(model, opt, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    train(model, opt, STEPS - 4, start=4)

    again, resumed = build()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    train(again, resumed, STEPS - 4, start=4)
    assert same(snapshot(model), snapshot(again))


@pytest.mark.parametrize("library", ["pytorch_optimizer", "torch_optimizer"])
def test_ranks_do_not_move_within_lookahead(library: str) -> None:
    model = net()
    inner = CTROptimizer(trainable(model), **OPTIONS, model=model, rank_scheduler=RankScheduler(interval=5))
    opt = lookahead(library, inner)
    backward(model, batch())
    with pytest.raises(ValueError, match="Lookahead wraps this optimizer"):
        opt.step()
