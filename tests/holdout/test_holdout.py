"""The held-out loss is measured without side effects, and adapts the bound."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import batch as data
from support import loss_of, net, snapshot, tiny_llama, train, trainable
from torch import Tensor, nn

from ctr_optim import CTROptimizer, RankScheduler
from ctr_optim.holdout import Holdout
from ctr_optim.report.log import scalars

VOCAB = 64


def rows(seed: int, n: int = 6, length: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (n, length), generator=generator)
    labels = ids.clone()
    labels[:, : 1 + seed % 3] = -100
    return {"input_ids": ids, "labels": labels}


def llama(**options: Any) -> nn.Module:
    return tiny_llama(**options).train()


def mean_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Return the reference: the mean loss over all target tokens of all batches."""
    total, count = 0.0, 0
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            logits, labels = model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
            total += float(nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum"))
            count += int((labels != -100).sum())
    for module, mode in modes:
        module.training = mode
    return total / count


def fit(model: nn.Module, opt: CTROptimizer, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        opt.zero_grad()
        model(**batch).loss.backward()
        opt.step()


def test_the_loss_is_the_mean_over_target_tokens() -> None:
    model, batches = llama(), [rows(0), rows(1), rows(2, n=3)]
    sums = Holdout(batches).sums(model)
    assert float(sums[0] / sums[1]) == pytest.approx(mean_loss(model, batches), rel=0.02)
    same = Holdout([rows(0)]).sums(model)
    assert float(same[0] / same[1]) == pytest.approx(mean_loss(model, [rows(0)]), rel=1e-6)


def test_token_ids_alone_are_predicted_one_from_the_other() -> None:
    model, ids = llama(), rows(0)["input_ids"]
    sums = Holdout(ids).sums(model)
    assert float(sums[0] / sums[1]) == pytest.approx(mean_loss(model, [{"input_ids": ids, "labels": ids}]), rel=1e-6)


def test_looking_leaves_no_trace() -> None:
    model = llama(dropout=0.2)
    opt = CTROptimizer(trainable(model), model=model, holdout=[rows(9)])
    fit(model, opt, [rows(0)])
    before, state, random = snapshot(model), copy.deepcopy(opt.state_dict()), torch.get_rng_state()
    Holdout([rows(9)]).sums(model)
    assert all(torch.equal(before[name], value) for name, value in snapshot(model).items())
    assert all(module.training for module in model.modules()) and torch.equal(random, torch.get_rng_state())
    for key, entry in opt.state_dict()["state"].items():
        assert all(torch.equal(entry[name], state["state"][key][name]) for name in entry)


def test_while_the_loss_falls_training_is_as_without() -> None:
    results = []
    for holdout in (None, [rows(1, n=40)]):
        model = llama()
        opt = CTROptimizer(trainable(model), model=model, max_kl=1e-4, holdout=holdout)
        fit(model, opt, [rows(1, n=40)] * 20)  # Training uses the held-out rows, so the loss falls.
        results.append(snapshot(model))
    assert opt.metrics()["holdout/best"] == opt.metrics()["holdout/loss"] < mean_loss(llama(), [rows(1, n=40)])
    assert opt.metrics()["trust/factor/holdout"] == 1.0
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def overfitted(steps: int, **options: Any) -> tuple[nn.Module, CTROptimizer]:
    """Train with labels unrelated to the held-out rows, and with a much too large bound."""
    model = llama()
    holdout = Holdout([rows(100, n=20)], every=4, **options)
    opt = CTROptimizer(trainable(model), model=model, max_kl=0.5, kl_schedule="lr", holdout=holdout)
    fit(model, opt, [rows(seed % 2) for seed in range(steps)])
    return model, opt


def test_where_the_loss_rises_the_bound_shrinks_and_the_weights_go_back() -> None:
    model, opt = overfitted(9)  # Measurements come after 4, 6 and 9 steps.
    found = opt.metrics()
    assert found["holdout/loss"] > found["holdout/best"] and found["trust/factor/holdout"] == pytest.approx(0.3)
    assert mean_loss(model, [rows(100, n=20)]) == pytest.approx(found["holdout/best"], rel=1e-6)
    free, _ = overfitted(9, rollback=False)
    assert mean_loss(free, [rows(100, n=20)]) > found["holdout/best"]


def test_the_best_weights_come_back_exactly() -> None:
    model, opt = overfitted(11, rollback=False)
    best = opt.metrics()["holdout/best"]
    assert opt.restore_best() == best
    assert mean_loss(model, [rows(100, n=20)]) == pytest.approx(best, rel=1e-6)
    fresh = llama()
    assert all(torch.equal(value, snapshot(fresh)[name]) for name, value in snapshot(model).items())


def test_resume_is_exact_also_for_the_way_back() -> None:
    straight, one = overfitted(12)
    model, opt = overfitted(6)
    other = llama()
    other.load_state_dict(model.state_dict())
    holdout = Holdout([rows(100, n=20)], every=4)
    two = CTROptimizer(trainable(other), model=other, max_kl=0.5, kl_schedule="lr", holdout=holdout)
    two.load_state_dict(copy.deepcopy(opt.state_dict()))
    fit(other, two, [rows(seed % 2) for seed in range(6, 12)])
    assert all(torch.equal(value, snapshot(other)[name]) for name, value in snapshot(straight).items())
    assert two.metrics()["trust/factor/holdout"] == one.metrics()["trust/factor/holdout"]


def test_a_checkpoint_without_a_hold_out_starts_one() -> None:
    model = net()
    opt = CTROptimizer(trainable(model), model=model)
    train(model, opt, 3)
    judged = CTROptimizer(
        trainable(model), model=model, holdout=Holdout([data(50)], loss=lambda m, b: loss_of(m(b[0]), b[1]))
    )
    judged.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, judged, 6, 3)
    assert judged.metrics()["holdout/best_step"] in (8, 0)


@pytest.mark.parametrize("resize", ["physical", "masked"])
def test_ranks_that_move_forget_the_best_weights(resize: str) -> None:
    model = llama()
    ranks = RankScheduler(interval=5, total_steps=40, budget=2)
    holdout = Holdout([rows(100, n=20)], every=2)
    opt = CTROptimizer(trainable(model), model=model, max_kl=0.2, holdout=holdout, rank_scheduler=ranks, resize=resize)
    fit(model, opt, [rows(seed) for seed in range(24)])
    assert opt.metrics()["holdout/best"] is not None
    opt.restore_best()
    fit(model, opt, [rows(30)])
    torch.save(opt.state_dict(), "/dev/null")


def test_looks_come_ever_more_rarely() -> None:
    holdout = Holdout([rows(0)], every=100)
    assert [step for step in range(600) if holdout.due(step)] == [8, 12, 18, 27, 40, 60, 90, 135, 202, 302, 402, 502]


@pytest.mark.parametrize(
    "given, error",
    [
        ([], "got no batches"),
        ("eval", "got a str"),
        (3, "got a int"),
        ({"input_ids": torch.ones(1, 2)}, "got a dict"),
    ],
)
def test_bad_hold_outs_are_refused(given: Any, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        CTROptimizer(trainable(net()), holdout=given)


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"shrink": 0.0}, {"shrink": 1.0}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"holdout: {next(iter(options))}"):
        Holdout([rows(0)], **options)


def test_a_model_without_a_loss_is_told() -> None:
    with pytest.raises(ValueError, match="gives no loss for batch 0"):
        Holdout([{"ids": data(0)[0]}]).sums(net())


def test_restore_best_needs_a_hold_out() -> None:
    with pytest.raises(ValueError, match="holdout=batches"):
        CTROptimizer(trainable(net())).restore_best()


def test_loggers_get_the_loss_and_the_factor() -> None:
    _, opt = overfitted(9)
    shown = scalars(opt.metrics())
    assert shown["ctr/holdout/loss"] == opt.metrics()["holdout/loss"]
    assert shown["ctr/trust/factor/holdout"] == pytest.approx(0.3)
