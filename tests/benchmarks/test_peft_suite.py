"""The program that runs PEFT's comparison suite: its data, and its changes to the suite."""

import json
import sys
import types

import pytest

pytest.importorskip("peft", reason="the suite is PEFT's")
datasets = pytest.importorskip("datasets", reason="the suite reads datasets")

from benchmarks.real import peft_suite  # noqa: E402


@pytest.fixture
def data(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    row = {"prompt": "Question: One and\u2028one?\nAnswer: ", "target": "1 + 1 = 2\n#### 2"}
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("short\n" + "long " * 100 + "\n")
    return tmp_path


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Stand-ins for the suite's modules, with the names that the program replaces."""
    utils, rows = types.ModuleType("utils"), types.ModuleType("data")

    class TrainConfig:
        def __init__(self, optimizer_type):
            self.optimizer_type = optimizer_type

        def __post_init__(self):
            raise ValueError("Invalid optimizer_type")

    utils.TrainConfig, utils.WARMUP_STEP_RATIO, utils.get_git_hash = TrainConfig, 0.1, lambda module: "0" * 40
    utils.get_optimizer_and_scheduler = lambda model, **options: ("the suite's", options["optimizer_type"])
    from transformers import get_cosine_schedule_with_warmup

    utils.get_cosine_schedule_with_warmup = get_cosine_schedule_with_warmup
    monkeypatch.setitem(sys.modules, "utils", utils)
    monkeypatch.setitem(sys.modules, "data", rows)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return utils, rows


def test_rows_have_the_suites_columns(data):
    load = peft_suite.loader(data)
    train = load("meta-math/MetaMathQA")["train"]
    assert train[0] == {
        "query": "One and\u2028one?", "response": " 1 + 1 = 2\n#### 2", "type": "GSM8K",
        "original_question": "One and\u2028one?",
    }  # fmt: skip
    assert load("openai/gsm8k", "main")["test"][0] == {"question": "One and\u2028one?", "answer": " 1 + 1 = 2\n#### 2"}
    with pytest.raises(ValueError, match="expected one of the suite's two datasets"):
        load("other")
    assert peft_suite.paragraphs(data, 5) == ["long " * 100]


def test_the_suite_builds_our_optimizer_and_keeps_its_own(data, suite):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from ctr_optim import CTROptimizer

    utils, rows = suite
    peft_suite.patched(data, data)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=2, target_modules="all-linear"))
    options = dict(max_steps=100, lr_scheduler_arg="cosine")
    optimizer, schedule = utils.get_optimizer_and_scheduler(model, optimizer_type="ctr", **options)
    assert isinstance(optimizer, CTROptimizer) and schedule.get_last_lr() == [0.0]  # the first step of the warm-up
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == model.get_nb_trainable_parameters()[0]
    assert utils.get_optimizer_and_scheduler(model, optimizer_type="AdamW", **options) == ("the suite's", "AdamW")
    utils.TrainConfig("ctr").__post_init__()
    with pytest.raises(ValueError, match="Invalid"):
        utils.TrainConfig("other").__post_init__()
    assert rows.get_wiki_small() == ["long " * 100]
    optimizer.close()
