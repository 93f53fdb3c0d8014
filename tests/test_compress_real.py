"""compress on a briefly trained adapter of the bundled model: its cost also holds on rows that it did not measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import trainable

from ctr_optim import compress
from ctr_optim.export.rows import batches_of
from ctr_optim.ranks.adapter import adapter_of
from ctr_optim.ranks.measurement import Measurement

peft = pytest.importorskip("peft", reason="the adapters are PEFT's")

BASE = Path(__file__).parents[1] / "examples" / "assets" / "base5m"
pytestmark = pytest.mark.skipif(not BASE.exists(), reason="needs the bundled model")


def rows(count: int) -> list[dict[str, Any]]:
    """Return rows that describe places in sentences."""
    areas, kinds, names = ("riverside", "city centre", "north"), ("pub", "hotel", "cafe", "museum"), ("Aroma", "Vaults")
    made = []
    for i in range(count):
        name, kind, area = names[i % 2], kinds[i * 7 % 4], areas[i * 5 % 3]
        made.append(
            {
                "prompt": f"name : {name} | type : {kind} | area : {area} | rating : {i % 5 + 1}\n",
                "completion": f"{name} is a {kind} in the {area} area , rated {i % 5 + 1} out of 5 .",
            }
        )
    return made


@pytest.fixture(scope="module")
def made() -> Any:
    """Return a model with an adapter trained for 12 steps, and rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    batches = batches_of(rows(96), tokenizer, 12, 64, torch.device("cpu"))
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    opt = torch.optim.AdamW(trainable(model), lr=4e-3)
    for step in range(12):
        model(**batches[step % 4]).loss.backward()
        opt.step()
        opt.zero_grad()
    return model, batches[4:6], batches[6:]


@pytest.mark.parametrize("tolerance", [3e-3, 3e-2])
def test_the_cost_holds_on_other_rows(made: Any, tolerance: float) -> None:
    model, measured, others = made
    layers = adapter_of(model, None, "test")
    judge = Measurement(model, others, None, "test")
    judge.factors(list(layers.pairs.values()))
    done = compress(model, tolerance, measured)
    after = {n: (p.A.detach().clone(), p.B.detach().clone()) for n, p in layers.pairs.items()}
    layers.resize(layers.whole)
    cost = judge.cost(lambda: layers.write(layers.whole), lambda: layers.write(after))
    layers.write(layers.whole)
    assert 0.5 * tolerance <= done.cost <= tolerance
    assert 0.3 * done.kl <= cost.kl <= 2.0 * done.kl
    assert done.parameters_after < 0.9 * done.parameters_before
