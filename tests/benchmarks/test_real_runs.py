"""Tests of the real-model benchmarks' measurements, methods and runs, on small models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_llama

pytest.importorskip("peft", reason="the benchmarks adapt models with PEFT")

from benchmarks.quality import tasks
from benchmarks.quality.tasks import Example
from benchmarks.real import data, measure, methods, specs
from benchmarks.real.run import read
from benchmarks.real.train import EarlyStopping, schedule, train

CPU = torch.device("cpu")
KEPT = {"task": "text", "split": "valid", "pieces": 6, "length": 12}


class Letters:
    """A tokenizer of 60 characters; 2 ends a text."""

    eos_token_id = pad_token_id = 2

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(t)["input_ids"] for t in text]}
        return {"input_ids": [4 + ord(c) % 60 for c in text]}


def base() -> Any:
    return tiny_llama(dtype=torch.float32, peft=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Create a folder with two tasks, one of them a choice task, and two texts."""
    for task in ("sum", "pick"):
        (tmp_path / task).mkdir()
        for split, count in (("train", 40), ("test", 12)):
            rows = [{"prompt": f"{i} + {split[:2]} ", "target": f" {i % 3}"} for i in range(count)]
            if task == "pick":
                rows = [{**r, "choices": [" 0", " 1", " 2"], "label": i % 3} for i, r in enumerate(rows)]
            (tmp_path / task / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "text").mkdir()
    for split in ("valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text(f"Some {split} text, of no meaning. " * 12)
    return tmp_path


def spec(**changes: Any) -> specs.Spec:
    return specs.complete({
        "task": "sum", "steps": 3, "batch": 4, "rank": 2, "alpha": 4, "held": 10, "evaluate": 8, "domains": ["pick"],
        "max_length": 24, "text": {"task": "text", "split": "test", "pieces": 4, "length": 12}, **changes,
    })  # fmt: skip


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    return train(spec(**changes), base(), data.Store(folder, Letters()), CPU)


def examples(count: int = 9) -> list[Example]:
    rows = [{"prompt": "ab" * (1 + i % 4), "target": "cde"[: 1 + i % 3]} for i in range(count)]
    return tasks.encode(rows, Letters())


def test_loss_and_kl_are_those_of_one_big_batch() -> None:
    model, other = tiny_llama(dtype=torch.float32, peft=False), tiny_llama(dtype=torch.float32, seed=1, peft=False)
    some = examples()
    expected = tasks.loss_per_token(model, some, CPU, size=3)
    assert measure.loss_per_token(model, some, CPU) == pytest.approx(expected, rel=1e-5)
    expected = tasks.kl_per_token(other, model, some, CPU, size=9)
    assert measure.kl_per_token(other, model, some, CPU) == pytest.approx(expected, rel=1e-4)
    assert model.training == other.training


def test_batches_hold_every_row_once_and_few_tokens() -> None:
    some = examples(30)
    parts = list(measure.in_batches(some, tokens=24))
    assert sorted(i for part in parts for i in part) == list(range(30))
    assert all(len(part) * max(len(some[i].ids) for i in part) <= 24 for part in parts)


def test_accuracy_counts_the_likeliest_choice() -> None:
    model = base()
    rows = [{"prompt": "abc"[i % 3] * 3, "choices": [" d", " ee", " f"], "label": i % 3} for i in range(20)]
    expected = tasks.choice_accuracy(model, rows, Letters(), CPU)
    found = measure.accuracy(model, rows, Letters(), CPU)
    assert found["accuracy"] == expected
    assert 0 < found["accuracy"] < 1


@pytest.mark.parametrize("name", specs.SCHEDULES)
def test_schedules(name: str) -> None:
    factor = schedule(name, 100)
    if name == "constant":
        assert factor is None
        return
    assert factor is not None
    values = [factor(t) for t in range(101)]
    assert max(values) == 1
    assert values[100] == pytest.approx(0, abs=1e-9)
    if name == "linear":
        assert values[:10] == pytest.approx([0.1 * (t + 1) for t in range(10)])
        assert values[55] == pytest.approx(0.5)
    else:
        assert values[50] == pytest.approx(0.5)


def test_a_run_has_every_figure(folder: Path) -> None:
    record = run(folder, task="pick", domains=["sum"], score=["accuracy", "kl_from_base"], curve=2)
    assert all(math.isfinite(record[k]) for k in ("loss", "text", "validation", "train_loss", "seconds"))
    assert set(record["domains"]) == {"sum"}
    assert set(record["score"]) == {"accuracy", "accuracy_norm", "kl_from_base", "kl_from_base_text"}
    assert [step for step, *_ in record["curve"]] == [2]
    assert record["metrics"]["trust/max_kl"] > 0
    json.dumps(record)


def test_no_steps_give_the_base(folder: Path) -> None:
    store, model = data.Store(folder, Letters()), base()
    record = run(folder, method="adamw", lr=1e-3, steps=0)
    test = store.test(spec(), "sum")
    assert record["loss"] == pytest.approx(measure.loss_per_token(model, test, CPU), rel=1e-6)
    assert run(folder, method="adamw", lr=1e-2)["loss"] != record["loss"]


def test_equal_specs_give_equal_runs_and_rows_limits_the_rows(folder: Path) -> None:
    first, second = (run(folder, rows=8, seed=3) for _ in range(2))
    assert first["loss"] == second["loss"]
    store = data.Store(folder, Letters())
    train_rows, held = store.split(spec(rows=8, seed=3), "sum")
    everything, same = store.split(spec(), "sum")
    assert (len(train_rows), len(everything), len(held)) == (8, 30, 10)
    assert [e.row for e in held] == [e.row for e in same]
    assert not {e.row["prompt"] for e in train_rows} & {e.row["prompt"] for e in held}


def test_a_sequence_tests_every_task_after_each(folder: Path) -> None:
    record = run(folder, method="adamw", lr=1e-2, sequence=["sum", "pick"], domains=[])
    assert [phase["task"] for phase in record["sequence"]] == ["sum", "pick"]
    assert all(set(phase["losses"]) == {"sum", "pick"} for phase in record["sequence"])
    assert record["loss"] == pytest.approx(record["sequence"][1]["losses"]["pick"])
    alone = run(folder, method="adamw", lr=1e-2, task="sum", domains=[])
    assert record["sequence"][0]["losses"]["sum"] == pytest.approx(alone["loss"], rel=1e-6)


def test_early_stopping_gives_back_the_best_weights() -> None:
    model = torch.nn.Linear(2, 1)
    losses = iter([3.0, 1.0, 2.0])
    stopping = EarlyStopping(model, [], steps=3, device=CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "loss_per_token", lambda *_: next(losses))
        for step in range(1, 4):
            with torch.no_grad():
                model.weight.fill_(float(step))
            stopping.look(step)
    stopping.restore()
    assert stopping.at == 2
    assert model.weight.tolist() == [[2.0, 2.0]]


def test_a_null_start_is_the_weight_on_unused_directions() -> None:
    torch.manual_seed(0)
    x = (torch.randn(200, 6) @ torch.randn(6, 10)).double()  # The text uses six of ten directions.
    weight = torch.randn(7, 10).double()
    a, b = (half.double() for half in methods.null_start(weight, x.mT @ x / 200, rank=3, share=1e-9))
    assert (a @ x.mT).abs().max() < 1e-4
    unused = torch.linalg.eigh(x.mT @ x).eigenvectors[:, :4]
    u, s, vh = torch.linalg.svd(weight @ unused @ unused.mT)
    torch.testing.assert_close(b @ a, (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["lora_null", "lora_null_frozen", "sc_lora", "corda", "adamw_kl", "adamw_replay"])
def test_peers_of_retention_start_as_the_base_and_train(folder: Path, method: str) -> None:
    start = run(folder, method=method, lr=1e-2, steps=0, retain=KEPT)
    plain = run(folder, method="adamw", lr=1e-2, steps=0)
    assert start["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    trained = run(folder, method=method, lr=1e-2, retain=KEPT)
    assert math.isfinite(trained["loss"])
    assert trained["loss"] != pytest.approx(start["loss"], rel=1e-6)
    if method == "lora_null_frozen":
        assert trained["parameters"] < plain["parameters"]


def test_the_kl_term_pulls_to_the_base_and_text_is_asked_for(folder: Path) -> None:
    weak, strong = (
        run(folder, method="adamw_kl", lr=3e-2, steps=12, options={"weight": w}, score=["kl_from_base"])
        for w in (0.0, 100.0)
    )
    assert strong["score"]["kl_from_base"] < 0.5 * weak["score"]["kl_from_base"]
    with pytest.raises(ValueError, match="got no text for lora_null, expected a dict of task"):
        run(folder, method="lora_null", lr=1e-2)


def test_kl_to_base_is_that_of_the_whole_models() -> None:
    adapted = tiny_llama(dtype=torch.float32)
    some = examples()
    with adapted.disable_adapter():
        plain = base()
        plain.load_state_dict(
            {
                k.replace(".base_layer", ""): v
                for k, v in adapted.base_model.model.state_dict().items()
                if "lora_" not in k
            }
        )
    found = methods.kl_to_base(adapted, tasks.collate(some, CPU)).item()
    assert found == pytest.approx(measure.kl_per_token(plain, adapted, some, CPU), rel=1e-4)
    assert found > 0


class Optimizer:
    """A CTROptimizer with the arguments ``retain``, ``kl_budget`` and ``holdout``."""

    def __init__(self, params: Any, retain: Any = "default", kl_budget: Any = None, holdout: Any = None) -> None: ...


def test_new_arguments_go_through_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.arange(24).view(12, 2)
    context = methods.Context(iter(()), text, [{"input_ids": text}])
    monkeypatch.setattr(methods, "CTROptimizer", Optimizer)
    assert methods.new_arguments({}, context) == {}
    assert methods.new_arguments({"retain": "none"}, context) == {"retain": None}
    assert methods.new_arguments({"retain": "self", "kl_budget": 0.1}, context) == {"retain": "self", "kl_budget": 0.1}
    found = methods.new_arguments({"retain": KEPT, "holdout": 2}, context)
    assert torch.equal(torch.cat(found["retain"]), text)
    assert found["holdout"] is context.holdout
    monkeypatch.setattr(methods, "CTROptimizer", torch.optim.AdamW)
    with pytest.raises(ValueError, match="does not have"):
        methods.new_arguments({"kl_budget": 0.1}, context)


def test_texts_and_rows_are_found_by_other_processes(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    data.Store(folder, Letters(), cache).warm(spec(retain=KEPT))
    silent = data.Store("nowhere", None, cache)
    assert len(silent.text(KEPT)) == 6
    assert silent.encoded("sum", "train", 24) == data.Store(folder, Letters()).encoded("sum", "train", 24)
    with pytest.raises(ValueError, match="expected 9999"):
        data.Store(folder, Letters()).text({**KEPT, "pieces": 9999})


def test_specs_are_checked_and_cut_off_lines_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['learning_rate'\]"):
        specs.complete({"learning_rate": 1})
    with pytest.raises(ValueError, match="schedule: got 'cos'"):
        specs.complete({"schedule": "cos"})
    assert specs.key_of({}) == specs.key_of(specs.DEFAULTS)
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"spec": {"seed": 1}}) + "\n" + json.dumps({"spec": {"seed": 2}})[:-5])
    assert [r["spec"]["seed"] for r in read([lines])] == [1]
