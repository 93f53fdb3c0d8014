"""Second moments of the layers' inputs on retained text."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import lora_layers, net, same, snapshot, tiny_llama
from torch import Tensor, nn

from ctr_optim.retention import Retention
from ctr_optim.retention import moments as moments_module


def texts(count: int = 4, rows: int = 4, length: int = 12, vocab: int = 64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (rows, length), generator=generator) for _ in range(count)]


def inputs_of(model: nn.Module, layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Return the inputs ``(n, d)`` of a layer during ``run``."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    model.eval()
    with torch.no_grad():
        run()
    handle.remove()
    return torch.cat(seen)


def dense(retention: Retention, name: str) -> Tensor:
    """Return the stored second moment of a layer as a dense matrix, ``(d, d)``."""
    s = retention.statistics[retention.layers[name]]
    return (s.vectors * (s.values - s.rest)) @ s.vectors.mT + s.rest * torch.eye(s.width, dtype=s.rest.dtype)


def test_whole_eigenpairs_are_the_second_moment() -> None:
    model, batches = tiny_llama(), texts()
    found = Retention.measure(model, batches, rank=48)
    assert len(found.layers) == 14
    for name in found.layers:
        layer = model.base_model.model.get_submodule(name)
        x = inputs_of(model, layer, lambda: [model(b) for b in batches])
        torch.testing.assert_close(dense(found, name), x.mT @ x / len(x))
        assert found.statistics[found.layers[name]].tokens == len(x) == 192


def test_few_eigenpairs_are_the_largest_and_the_rest_has_the_right_trace() -> None:
    model, batches = tiny_llama(), texts()
    found, name = Retention.measure(model, batches, rank=5), "model.layers.1.mlp.down_proj"
    x = inputs_of(model, model.base_model.model.get_submodule(name), lambda: [model(b) for b in batches])
    values, s = torch.linalg.eigvalsh(x.mT @ x / len(x)), found.statistics[name]
    torch.testing.assert_close(s.values, values.flip(-1)[:5])
    torch.testing.assert_close(s.rest, values[:-5].mean())
    P = found.metric_for(name)
    assert P is not None
    inner = P.to_dense() @ (x.mT @ x / len(x)) @ P.to_dense()
    torch.testing.assert_close(inner.trace(), values.sum())


def test_layers_that_read_one_input_share_their_statistics() -> None:
    found = Retention.measure(tiny_llama(), texts(), rank=4)
    one = "model.layers.0."
    assert {found.layers[f"{one}self_attn.{p}_proj"] for p in "qkv"} == {f"{one}self_attn.q_proj"}
    assert {found.layers[f"{one}mlp.{p}_proj"] for p in ("gate", "up")} == {f"{one}mlp.gate_proj"}
    assert len(found.statistics) == 2 * 4


def test_a_cast_for_every_adapter_does_not_hide_that_the_input_is_one() -> None:
    model = tiny_llama(torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    found = Retention.measure(model, texts(), rank=4)
    assert len(found.statistics) == 2 * 4
    assert all(s.values.dtype == torch.float32 for s in found.statistics.values())


def test_one_input_read_through_masks_of_ones_own_is_not_shared() -> None:
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module, factor: float) -> None:
            super().__init__()
            self.lora_A, self.lora_B, self.factor = inner.lora_A, inner.lora_B, factor

        def forward(self, x: Tensor) -> Tensor:
            return self.lora_B(self.lora_A(self.factor * x))

    base = net()
    model = nn.Module()
    model.embed, model.one, model.two = base.embed, Scaled(base.up, 1.0), Scaled(net(1).up, 2.0)
    model.forward = lambda ids: [layer(model.embed(ids)) for layer in (model.one, model.two)]

    def forward(ids: Tensor) -> Any:
        x = model.embed(ids)
        return [model.one(x), model.two(x)]

    model.forward = forward
    found = Retention.measure(model, texts(vocab=11), rank=8)
    torch.testing.assert_close(dense(found, "two"), 4 * dense(found, "one"))


def test_padding_counts_for_nothing() -> None:
    model, (ids,) = tiny_llama(), texts(1, 8)
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    padded = ids.masked_fill(mask == 0, 0)
    batch = {"input_ids": padded, "attention_mask": mask, "labels": padded}
    found, expected = Retention.measure(model, [batch], rank=8), Retention.measure(model, [ids[:, :7]], rank=8)
    for name in expected.layers:
        torch.testing.assert_close(dense(found, name), dense(expected, name))


def test_batches_in_every_form_say_the_same() -> None:
    model, batches = tiny_llama(), texts(4, 1)
    forms = [
        [b.squeeze(0) for b in batches],
        [{"input_ids": b, "labels": b} for b in batches],
        [{"input_ids": b[0].tolist(), "attention_mask": [1] * 12, "labels": b[0].tolist()} for b in batches],
        torch.cat(batches),
        (b for b in batches),
    ]
    expected = Retention.measure(model, batches, rank=4)
    for form in forms:
        found = Retention.measure(model, form, rank=4)
        for name in found.layers:
            torch.testing.assert_close(dense(found, name), dense(expected, name))


def test_a_sketch_of_a_wide_layer_finds_the_largest_eigenpairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "EXACT_WIDTH", 8)
    monkeypatch.setattr(moments_module, "EXACT_BYTES", 0)
    generator = torch.Generator().manual_seed(3)
    scales = 1 / torch.arange(
        1, 201, dtype=torch.float64
    )  # as for activations, a few directions hold most of the trace
    rows = torch.randn(4000, 200, generator=generator, dtype=torch.float64) * scales
    total = moments_module.Sum(200, 2 * 4 + moments_module.OVERSAMPLED, rows.device, rows.dtype)
    for part in rows.split(500):
        total.add(part)
    values, vectors = total.eigenpairs(4)
    exact = torch.linalg.eigvalsh(rows.mT @ rows).flip(-1)
    torch.testing.assert_close(values[:2], exact[:2], rtol=0.05, atol=0)
    assert float((rows @ vectors).square().sum()) > 0.95 * float(exact[:4].sum())
    torch.testing.assert_close(total.trace, exact.sum())
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(4, dtype=torch.float64))
    sketched = Retention.measure(tiny_llama(), texts(), rank=2)
    assert sketched.statistics["model.layers.0.self_attn.q_proj"].values.shape == (2,)


def test_measuring_leaves_no_trace() -> None:
    model = tiny_llama(dropout=0.3)
    model.config.use_cache = True
    model.base_model.model.model.layers[1].eval()
    modes, before = [m.training for m in model.modules()], snapshot(model)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    a = Retention.measure(model, texts(), rank=4)
    assert (torch.rand(1), np.random.rand()) == expected
    assert [m.training for m in model.modules()] == modes and same(snapshot(model), before)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.config.use_cache and all(p.grad is None for p in model.parameters())
    b = Retention.measure(model, texts(), rank=4)  # equal results, since dropout is off
    assert all(torch.equal(a.statistics[n].values, b.statistics[n].values) for n in a.statistics)


def test_state_goes_through_a_file_and_back() -> None:
    found, file = Retention.measure(tiny_llama(), texts(), rank=4), io.BytesIO()
    torch.save(found.state_dict(), file)
    file.seek(0)
    loaded = Retention()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.layers == found.layers and loaded.rank == 4
    assert all(torch.equal(dense(loaded, n), dense(found, n)) for n in found.layers)
    for broken in ({}, {"rank": 4, "layers": {"a": "b"}, "statistics": {}}, {**found.state_dict(), "statistics": 3}):
        with pytest.raises(ValueError, match="state_dict"):
            loaded.load_state_dict(broken)


def test_merged_statistics_are_those_of_the_tokens_of_both() -> None:
    model, one, two = tiny_llama(), texts(2, 8), texts(4, 8, seed=1)
    whole = [Retention.measure(model, batches, rank=48) for batches in (one, two, [*one, *two])]
    merged = whole[0].merge(whole[1])
    for name in merged.layers:
        torch.testing.assert_close(dense(merged, name), dense(whole[2], name))
    assert merged.statistics[name].tokens == 576
    cut = [Retention.measure(model, batches, rank=4) for batches in (one, two)]
    few, average = cut[0].merge(cut[1]), dense(cut[0], name) / 3 + dense(cut[1], name) * 2 / 3
    torch.testing.assert_close(few.statistics[few.layers[name]].values, torch.linalg.eigvalsh(average).flip(-1)[:4])
    torch.testing.assert_close(dense(few, name).trace(), average.trace())
    with pytest.raises(ValueError, match="input features"):
        cut[0].merge(Retention(4, {name: name}, {name: Retention.measure(net(), texts(vocab=11), 4).statistics["up"]}))


@pytest.mark.parametrize(
    ("batches", "error", "says"),
    [
        ([], ValueError, "no batches"),
        ("some text", TypeError, "tokenise"),
        ([torch.zeros(2, 5)], TypeError, "token ids of shape"),
        (["some text"], TypeError, "batch 0 is a str"),
        ([torch.full((2, 40), 64)], ValueError, "token id 64.*0 to 63.*own tokenizer"),
        ([torch.full((2, 40), -1)], ValueError, "token id -1"),
        ([torch.zeros(0, 4, dtype=torch.long)], ValueError, "batch 0 is empty"),
        ([torch.full((2, 4), 3)], ValueError, "got 8 tokens, and rank=16 needs at least 64"),
    ],
)
def test_errors_say_what_to_do(batches: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Retention.measure(tiny_llama(), batches)


def test_models_that_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="no LoRA layers"):
        Retention.measure(nn.Linear(3, 3), [torch.zeros(1, 3, dtype=torch.long)])
    with pytest.raises(ValueError, match="rank"):
        Retention.measure(net(), texts(vocab=11), rank=0)
    model = tiny_llama()
    model.base_model.model.model.norm.weight.data.fill_(1.0)
    model.base_model.model.model.embed_tokens.weight.data[5, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is not finite"):
        Retention.measure(model, [torch.full((2, 40), 5)])


def test_layers_that_no_token_reaches_are_named() -> None:
    model = net()
    model.down.forward = model.down.base.forward  # as a fused kernel that reads only the weights
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = Retention.measure(model, texts(vocab=11), rank=4)
    assert any("1 of 2 LoRA layers (down" in str(w.message) for w in caught)
    assert found.metric_for("down") is None and found.metric_for("up") is not None
    assert set(lora_layers(model)) == {"up", "down"}
