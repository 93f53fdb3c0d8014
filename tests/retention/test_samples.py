"""Retained text that is sampled from the model itself."""

from __future__ import annotations

import pytest
import torch
from support import VOCAB, net, same, snapshot, tiny_llama
from torch import Tensor

from ctr_optim.retention import Retention, own_samples, random_tokens


def test_samples_have_the_base_models_own_chances() -> None:
    model = tiny_llama(torch.float32)
    batches = own_samples(model, count=400, length=3)
    drawn = torch.cat(batches)
    assert drawn.shape == (400, 3) and bool((drawn[:, 0] == 1).all())
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        chances = model(torch.ones(1, 1, dtype=torch.long)).logits[0, -1].softmax(-1)
    counts = torch.bincount(drawn[:, 1], minlength=64)
    statistic = float(((counts - 400 * chances).square() / (400 * chances)).sum())
    assert statistic < 63 + 5 * (2 * 63) ** 0.5  # chi squared with 63 degrees of freedom
    assert bool((drawn == 2).any())  # sequences continue after the end-of-text token


def test_a_trained_adapter_does_not_show_in_the_samples() -> None:
    model = tiny_llama(torch.float32)
    with_adapter = own_samples(model, 4, 12)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    assert torch.equal(torch.cat(own_samples(model, 4, 12)), torch.cat(with_adapter))


def test_drawing_leaves_no_trace() -> None:
    model = tiny_llama(torch.float32, dropout=0.3)
    before, modes = snapshot(model), [m.training for m in model.modules()]
    generation = model.generation_config
    kept = generation.to_dict()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = own_samples(model, 4, 8, seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert same(snapshot(model), before) and [m.training for m in model.modules()] == modes
    assert model.generation_config is generation and generation.to_dict() == kept
    assert torch.equal(torch.cat(own_samples(model, 4, 8, seed=3)), torch.cat(first))
    assert not torch.equal(torch.cat(own_samples(model, 4, 8, seed=4)), torch.cat(first))


class Chain(torch.nn.Module):
    """A model without ``generate`` that always predicts the next token id."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return 100.0 * torch.nn.functional.one_hot((ids + 1) % VOCAB, VOCAB)


def test_models_without_generate() -> None:
    assert torch.equal(own_samples(Chain(), 2, 5)[0], torch.arange(5).expand(2, 5))
    drawn = own_samples(net(b_std=0.0), 20, 12)
    assert [b.shape for b in drawn] == [(16, 12), (4, 12)]
    assert Retention.measure(net(), drawn, rank=4).layers.keys() == {"up", "down"}


def test_random_tokens_are_of_the_vocabulary() -> None:
    drawn = torch.cat(random_tokens(tiny_llama(), 20, 50))
    assert drawn.shape == (20, 50) and len(drawn.unique()) == 64


@pytest.mark.parametrize("options", [{"count": 0}, {"length": 1}, {"temperature": 0.0}])
def test_what_cannot_be_drawn(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="own_samples"):
        own_samples(net(), **options)  # type: ignore[arg-type]


def test_a_model_without_logits() -> None:
    class Summary(Chain):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.zeros(len(ids), 3)

    with pytest.raises(ValueError, match="no logits"):
        own_samples(Summary(), 2, 5)
