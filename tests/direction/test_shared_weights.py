"""Layers that share one A: the parameter takes one step, and the prediction counts it in every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import backward, batch, factors_of, kl_of_step, net, optimizer, train
from torch import Tensor, nn

from ctr_optim import RankScheduler


class Tied(nn.Module):
    """A Net whose second LoRA layer uses the A of the first."""

    def __init__(self, d_out: int) -> None:
        super().__init__()
        one, two = net(seed=1), net(seed=2)
        self.embed, self.head = one.embed, nn.Linear(d_out, 11, dtype=torch.float64).requires_grad_(False)
        self.up, self.down = one.up, two.up
        for layer, width in ((self.up, 8), (self.down, d_out)):
            layer.base = nn.Linear(8, width, bias=False, dtype=torch.float64).requires_grad_(False)
            layer.lora_B = nn.Linear(3, width, bias=False, dtype=torch.float64)
        self.down.lora_A = self.up.lora_A

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.embed(ids)).tanh()).tanh())


@pytest.fixture(params=[8, 9], ids=["one shape", "two shapes"])
def model(request: Any) -> Tied:
    return Tied(request.param)


@pytest.mark.parametrize("foreach", [None, False])
def test_a_shared_weight_takes_one_step(model: Tied, foreach: bool | None) -> None:
    lr, weight = 1e-3, model.up.lora_A.weight
    opt = optimizer(model, lr=lr, max_kl=None, foreach=foreach)
    before = weight.detach().clone()
    backward(model, batch())
    assert weight.grad is not None
    grad = weight.grad.clone()
    opt.step()
    basis = opt.state[weight]["basis"]
    rotated = basis.mT @ grad
    expected = before - lr * basis @ (rotated / (rotated.abs() + 1e-8))
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)
    train(model, opt, 3, 1)
    assert float(opt.state[weight]["step"]) == 4


def test_the_prediction_counts_a_shared_weight_in_every_layer(model: Tied) -> None:
    opt = optimizer(model, lr=0.05, max_kl=1e-3)
    train(model, opt, 4)
    before = {pair.name: (pair.A.detach().clone(), pair.B.detach().clone()) for pair in opt.pairs}
    train(model, opt, 1, 4)
    after = {pair.name: (pair.A.detach(), pair.B.detach()) for pair in opt.pairs}
    expected = kl_of_step(factors_of(opt), before, after)
    assert opt.metrics()["trust/predicted_kl"] == pytest.approx(expected, rel=1e-6)


def test_ranks_of_a_shared_weight_do_not_move(model: Tied) -> None:
    with pytest.raises(ValueError, match=r"rank_scheduler: up, down share one A"):
        optimizer(model, rank_scheduler=RankScheduler())


def test_a_shared_weight_survives_a_checkpoint(model: Tied) -> None:
    opt = optimizer(model, lr=0.05, max_kl=1e-3)
    train(model, opt, 3)
    other = optimizer(model, lr=0.05, max_kl=1e-3)
    other.load_state_dict(opt.state_dict())
    assert len(other.state) == len({id(p) for pair in opt.pairs for p in (pair.A, pair.B)}) == 3
