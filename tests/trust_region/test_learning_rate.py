"""If the trust region sets the length of steps, only the learning rate's schedule matters."""

from __future__ import annotations

import pytest
import torch
from support import net, snapshot, train, trainable

from ctr_optim import CTROptimizer
from ctr_optim.trust_region.region import scale_within


def after(lr: float | None, **options: object) -> dict[str, torch.Tensor]:
    model = net()
    opt = CTROptimizer(trainable(model), lr=lr, model=model, max_kl=1e-3, **options)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, 12)
    for step in range(12):
        train(model, opt, 1, step)
        schedule.step()
    return snapshot(model)


@pytest.mark.parametrize("lr", [1e-5, 2e-4, 10.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_rate_trains_the_same(lr: float, weight_decay: float) -> None:
    default, other = after(None, weight_decay=weight_decay), after(lr, weight_decay=weight_decay)
    for name, value in default.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("lr", [1e-5, None, 10.0])
def test_the_scale_says_whether_the_bound_acted_at_any_rate(lr: float | None) -> None:
    scales = []
    for max_kl in (1e-3, 1e6):
        model = net()
        opt = CTROptimizer(trainable(model), lr=lr, model=model, max_kl=max_kl)
        train(model, opt, 1)
        scales.append(opt.metrics()["trust/scale"])
    assert 0 < scales[0] < 1 and scales[1] == 1.0


def test_groups_keep_the_ratio_of_their_rates() -> None:
    moves = []
    for scale in (1.0, 1e-3):
        model = net()
        params = trainable(model)
        before = [p.detach().clone() for p in params]
        groups = [{"params": params[:2], "lr": 0.08 * scale}, {"params": params[2:], "lr": 0.01 * scale}]
        opt = CTROptimizer(groups, model=model, max_kl=1e-3)
        train(model, opt, 3)
        moves.append([p.detach() - b for p, b in zip(params, before, strict=True)])
    for one, other in zip(*moves, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_the_users_rate_holds_where_the_bound_follows_it_alone() -> None:
    model = net()
    opt = CTROptimizer(trainable(model), lr=1e-6, model=model, kl_schedule="lr")
    train(model, opt, 2)
    assert opt.metrics()["trust/scale"] == 1.0


def test_a_rate_of_zero_moves_nothing() -> None:
    model = net()
    before = snapshot(model)
    train(model, CTROptimizer(trainable(model), lr=0.0, model=model), 3)
    assert all(torch.equal(before[name], value) for name, value in snapshot(model).items())


@pytest.mark.parametrize("most", [1.0, 50.0, 0.01])
def test_a_scale_up_to_the_most(most: float) -> None:
    kl = torch.tensor([0.0, 1e-6, 1e-3, 10.0, float("nan")], dtype=torch.float64)
    scale = scale_within(kl, 1e-3, most)
    assert scale[0] == most and scale[-1] == 0
    assert bool(((scale[:-1] ** 2 * kl[:-1]) <= 1e-3 * (1 + 1e-12)).all()) and bool((scale <= most).all())
