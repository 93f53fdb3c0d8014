"""The draft of a contribution to PEFT works like PEFT's own optimizers, and accepts its example config."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import llama_batch, llama_loss, tiny_llama, trainable

from ctr_optim import CTROptimizer

pytest.importorskip("peft", reason="the draft is PEFT's")
optimizers = pytest.importorskip("peft.optimizers", reason="PEFT's own optimizers")

FOLDER = Path(__file__).parents[2] / "examples" / "peft"


@pytest.fixture
def create() -> Any:
    spec = importlib.util.spec_from_file_location("draft", FOLDER / "ctr.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.create_ctr_optimizer


def test_it_trains_the_adapter_within_the_bound(create: Any) -> None:
    model = tiny_llama(dtype=torch.float32)
    optimizer = create(model, max_kl=0.02)
    assert isinstance(optimizer, CTROptimizer) and len(optimizer.pairs) == 14
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in trainable(model)}
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = llama_loss(model, llama_batch())
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
        assert optimizer.metrics()["trust/predicted_kl"] <= 0.02 * (1 + 1e-4)
    assert losses[-1] < losses[0]


def test_it_has_the_form_of_peft_own(create: Any) -> None:
    """The function takes the model first and other arguments by keyword, and passes unknown ones on."""
    for theirs in (create, optimizers.create_loraplus_optimizer):
        first, *rest = inspect.signature(theirs).parameters.values()
        assert first.name == "model" and rest[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert create(tiny_llama(), betas=(0.5, 0.9)).defaults["betas"] == (0.5, 0.9)


def test_the_suites_config_is_what_it_takes(create: Any) -> None:
    [file] = FOLDER.rglob("training_params.json")
    config = json.loads(file.read_text())
    assert config["optimizer_type"] == "ctr"
    assert create(tiny_llama(), **config["optimizer_kwargs"]).pairs


def test_refusals(create: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no trainable parameters"):
        create(tiny_llama().requires_grad_(False))
    monkeypatch.setitem(sys.modules, "ctr_optim", None)
    with pytest.raises(ImportError, match="pip install ctr_optim"):
        create(tiny_llama())
