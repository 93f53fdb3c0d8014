"""compress(): the cut adapter's outputs, the measured cost, and the layers' attributes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import batch, exact_kl, llama_batch, loss_of, net, relative_error, same, snapshot, tiny_llama
from torch import Tensor, nn

from ctr_optim import compress, export_compact
from ctr_optim.model.registry import find_pairs

TOLERANCES = [1e-3, 3e-3, 8e-3]


def shifted(seed: int, **options: Any) -> dict[str, Tensor]:
    """Return a batch for a causal model that shifts the labels itself."""
    return {k: v for k, v in llama_batch(seed, **options).items() if k in ("input_ids", "labels")}


def trained(**lora: Any) -> nn.Module:
    """Return a tiny Llama with an adapter whose directions differ in utility."""
    model = tiny_llama(**{"r": 6, "lora_alpha": 6, **lora})
    with torch.no_grad():
        for pair in find_pairs(model):
            pair.B.mul_(16 * 2.0 ** -torch.arange(pair.rank, dtype=pair.B.dtype))
    return model


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    return [shifted(seed) for seed in range(count)]


@torch.no_grad()
def logits_of(model: nn.Module, data: list[dict[str, Tensor]]) -> Tensor:
    """Return the logits of all loss tokens, in eval mode."""
    mode = model.training
    model.eval()
    rows = [model(input_ids=b["input_ids"]).logits[:, :-1][b["labels"][:, 1:] != -100] for b in data]
    model.train(mode)
    return torch.cat(rows)


@torch.no_grad()
def loss_on(model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    labels = torch.cat([b["labels"][:, 1:][b["labels"][:, 1:] != -100] for b in data])
    return float(loss_of(logits_of(model, data), labels))


@pytest.mark.parametrize("tolerance", TOLERANCES)
def test_the_real_cost_is_close_to_the_tolerance(tolerance: float) -> None:
    model, data = trained(), batches()
    before, loss = logits_of(model, data), loss_on(model, data)
    done = compress(model, tolerance, data)
    kl = float(exact_kl(before, logits_of(model, data)).mean())
    assert done.kl == pytest.approx(kl, rel=1e-3)
    assert done.loss_before == pytest.approx(loss, rel=1e-5)
    assert done.loss_after == pytest.approx(loss_on(model, data), rel=1e-5)
    cost = max(kl, loss_on(model, data) - loss)
    assert done.cost == pytest.approx(cost, rel=1e-2)
    assert 0.5 * tolerance <= cost <= tolerance * (1 + 1e-3)
    assert done.parameters_after == sum(p.rank * p.cost for p in find_pairs(model) if bool(p.B.any()))
    assert done.parameters_after < done.parameters_before


def test_a_larger_tolerance_leaves_a_smaller_adapter() -> None:
    sizes = [compress(trained(), tolerance, batches()).parameters_after for tolerance in TOLERANCES]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_cut_again_it_stays_as_it_is() -> None:
    """A second cut measures its cost from the cut adapter, so only a much smaller tolerance cuts nothing."""
    model, data = trained(), batches()
    compress(model, 1e-2, data)
    before = snapshot(model)
    assert compress(model, 1e-9, data) == []
    assert same(before, snapshot(model))


def test_directions_that_are_worth_nothing_go_at_any_tolerance() -> None:
    model, data = trained(), batches()
    ranks = {}
    with torch.no_grad():
        for index, pair in enumerate(find_pairs(model)):
            ranks[pair.name] = 6 - index % 7
            pair.B[:, ranks[pair.name] :] = 0
            turn = torch.linalg.qr(torch.randn(6, 6, dtype=pair.B.dtype))[0]  # makes all directions nonzero
            pair.A.copy_(turn @ pair.A)
            pair.B.copy_(pair.B @ turn.mT)
    before = logits_of(model, data)
    done = compress(model, 1e-12, data)
    assert done.ranks == ranks
    assert done.cost <= 1e-12
    assert relative_error(logits_of(model, data), before) < 1e-10
    assert {e.name for e in done if e.new_rank == 0} == {name for name, rank in ranks.items() if rank == 0}


def test_the_events_say_what_changed() -> None:
    model = trained()
    before = {pair.name: pair.rank for pair in find_pairs(model)}
    scalings = {pair.name: pair.scaling for pair in find_pairs(model)}
    done = compress(model, 1e-2, batches())
    assert [e.name for e in done] == sorted(n for n in before if done.ranks[n] != before[n])
    for event in done:
        assert (event.old_rank, event.new_rank, event.kept) == (6, done.ranks[event.name], done.ranks[event.name])
        assert event.reason == "shrink" and event.utility >= 0
    for pair in find_pairs(model):
        assert pair.rank == max(1, done.ranks[pair.name])
        assert pair.scaling == pytest.approx(scalings[pair.name], rel=1e-12)


def test_nothing_of_the_model_is_left_changed() -> None:
    model = trained().requires_grad_(False)  # PEFT loads adapters with frozen weights
    next(model.parameters()).requires_grad_(True)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    compress(model, 1e-2, batches())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_dropout_adds_no_noise() -> None:
    assert compress(trained(dropout=0.3), 1e-2, batches()).ranks == compress(trained(), 1e-2, batches()).ranks


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 3, ".*mlp.*": 8}, "alpha_pattern": {"layers.0.*": 5}},
}


@pytest.mark.parametrize("export", ["save_pretrained", "export_compact"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized")
def test_what_is_saved_loads_as_the_same_function(variant: str, export: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, data = trained(dtype=torch.float32, **VARIANTS[variant]), batches()
    done = compress(model, 5e-3, data, min_rank=1 if export == "save_pretrained" else 0)
    if export == "save_pretrained":
        model.save_pretrained(tmp_path)
    else:
        export_compact(model, tmp_path)
    fresh = PeftModel.from_pretrained(tiny_llama(torch.float32, peft=False), str(tmp_path))
    ranks = {pair.name: pair.rank for pair in find_pairs(fresh)}
    left = (
        {n: r for n, r in done.ranks.items() if r}
        if variant != "dora"
        else {n: max(1, r) for n, r in done.ranks.items()}
    )
    assert ranks == left
    assert relative_error(logits_of(fresh, data), logits_of(model, data)) < 1e-5


def test_ranks_in_multiples_and_one_rank_for_all() -> None:
    data = batches()
    some = compress(trained(r=8), 4e-3, data, multiple=4)
    assert set(some.ranks.values()) <= {0, 4, 8} and len(set(some.ranks.values())) > 1
    one = compress(trained(r=8), 4e-3, data, uniform=True)
    assert len(set(one.ranks.values())) == 1
    assert 0.0 < one.cost <= 4e-3 and 0.0 < some.cost <= 4e-3


@pytest.mark.parametrize("uniform", [False, True])
def test_the_config_names_only_layers_that_differ(uniform: bool) -> None:
    model = trained()
    done = compress(model, 1e-2, batches(), uniform=uniform, min_rank=1)
    config = model.peft_config["default"]
    others = {n: r for n, r in done.ranks.items() if r != config.r}
    assert config.rank_pattern.keys() == config.alpha_pattern.keys() and len(config.rank_pattern) == len(others)
    assert sorted(config.rank_pattern.values()) == sorted(others.values())
    if uniform:
        assert config.rank_pattern == {} and config.r == config.lora_alpha == next(iter(done.ranks.values()))


def plain_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return loss_of(model(data[0]), data[1])


def test_hand_written_layers_and_a_loss_of_ones_own() -> None:
    model = net(rank=5)
    data = [batch(seed) for seed in range(4)]
    done = compress(model, 3e-2, data, loss_fn=plain_loss)
    assert 0.0 < done.cost <= 3e-2
    assert done.parameters_after < done.parameters_before
    assert done.tokens == sum(int((labels != -100).sum()) for _, labels in data)


def test_token_ids_are_batches_too() -> None:
    model = trained()
    done = compress(model, 1e-2, [b["input_ids"] for b in batches()])
    assert done.tokens == 3 * 4 * 7 and 0 < done.cost <= 1e-2


def test_a_layer_that_no_token_passes_keeps_its_rank() -> None:
    model = net(rank=4)
    model.unused = type(model.up)(8, 10, 4, 1.0).double()
    with pytest.warns(UserWarning, match=r"no loss token passes 1 of 3 layers \(unused"):
        done = compress(model, 1e-1, [batch()], loss_fn=plain_loss)
    assert done.ranks["unused"] == 4


def test_a_model_without_logits_is_cut_by_its_loss() -> None:
    model = net(rank=5)
    inner = model.forward
    model.forward = lambda ids, labels: {"loss": loss_of(inner(ids), labels)}  # type: ignore
    data = [(ids, inner(ids).argmax(-1)) for ids, _ in (batch(seed) for seed in range(4))]
    done = compress(model, 3e-2, data, loss_fn=lambda m, b: m(*b)["loss"])
    assert 0.0 < done.cost == done.loss_after - done.loss_before <= 3e-2


def test_a_refit_leaves_less_within_the_same_tolerance() -> None:
    model, data = trained(), [shifted(seed, n=16, length=16) for seed in range(8)]
    plain = compress(trained(), 2e-3, data)
    before = logits_of(model, data[1::2])  # the batches that measure the cost
    done = compress(model, 2e-3, data, refit=24)
    assert done.parameters_after < plain.parameters_after
    assert done.kl == pytest.approx(float(exact_kl(before, logits_of(model, data[1::2])).mean()), rel=1e-3)
    assert done.cost <= 2e-3
    assert all(p.grad is None for p in model.parameters())
    for pair in find_pairs(model):
        assert pair.rank == max(1, done.ranks[pair.name])
        assert bool(pair.B.any()) == (done.ranks[pair.name] > 0)


def test_a_refit_that_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="refit: got 1 batch with loss tokens, expected at least two"):
        compress(trained(), 1e-3, batches(1), refit=4)
    with pytest.raises(ValueError, match="refit: got -1, expected a whole number of at least 0"):
        compress(trained(), 1e-3, batches(2), refit=-1)


def test_an_error_leaves_the_adapter_as_it_was() -> None:
    model, calls = trained(), [0]
    before = snapshot(model)

    def breaks(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        calls[0] += 1
        if calls[0] > 5:
            raise RuntimeError("out of memory")
        return model(**data).loss

    with pytest.raises(RuntimeError, match="out of memory"):
        compress(model, 1e-3, batches(2), loss_fn=breaks)
    assert same(before, snapshot(model))


def pissa() -> nn.Module:
    return tiny_llama(torch.float32, init_lora_weights="pissa")


def merged() -> nn.Module:
    model = trained()
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    "build, tolerance, data, match",
    [
        (trained, 0.0, batches, "tolerance: got 0.0, expected a positive number"),
        (trained, -1e-3, batches, "tolerance: got -0.001, expected a positive number"),
        (trained, float("nan"), batches, "tolerance: got nan, expected a positive number"),
        (trained, 1e-2, lambda: None, "batches: got None, expected a few batches"),
        (trained, 1e-2, list, "got no batches, expected a few"),
        (trained, 1e-2, lambda: [shifted(0, prompt=8)], "none of 1 batches has a loss token"),
        (trained, 1e-2, lambda: [{"input_ids": batch()[0]}], "the model gave no loss; expected batches with labels"),
        (lambda: tiny_llama(peft=False), 1e-2, batches, "found no LoRA layers in LlamaForCausalLM"),
        (pissa, 1e-2, batches, "init_lora_weights='pissa' took the first adapter out of the base weights"),
        (merged, 1e-2, batches, "the adapter is merged into .*unmerge_adapter"),
    ],
)
def test_bad_input(build: Callable[[], nn.Module], tolerance: float, data: Callable[[], Any], match: str) -> None:
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        compress(model, tolerance, data())
    assert same(before, snapshot(model))


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"tolerance: got '0\.01', expected a number"):
        compress(trained(), "0.01", batches())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a batch is a list; pass dicts, token ids, or loss_fn"):
        compress(trained(), 0.01, [[1, 2]])
    with pytest.raises(ValueError, match="multiple: got 0, expected a whole number of at least 1"):
        compress(trained(), 0.01, batches(), multiple=0)


def test_the_error_is_that_of_labels_drawn_from_the_uncut_model() -> None:
    model, data = trained(), batches()
    before = logits_of(model, data).double().log_softmax(-1)
    done = compress(model, 3e-3, data)
    change = before - logits_of(model, data).double().log_softmax(-1)
    p = before.exp()
    variance = (p * change**2).sum(-1) - (p * change).sum(-1) ** 2
    assert done.error == pytest.approx(float(variance.mean().div(done.tokens).sqrt()), rel=0.1)


def test_too_few_loss_tokens_for_the_tolerance_are_said() -> None:
    with pytest.warns(UserWarning, match=r"60 loss tokens show the rise of the loss only to"):
        compress(trained(), 1e-3, batches())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = compress(trained(), 0.1, [shifted(seed) for seed in range(24)])
    assert done.error < 0.1 and not any("loss tokens show" in str(w.message) for w in caught)
