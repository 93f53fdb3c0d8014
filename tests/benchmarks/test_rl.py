"""Reinforcement learning: the task's parsing, GRPO's arithmetic, a run on the bundled model, the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="the benchmarks adapt models with PEFT")

from benchmarks.real import data
from benchmarks.rl import arithmetic, grpo, policy, report, specs
from benchmarks.rl.run import read

BASE5M = Path(__file__).resolve().parents[2] / "examples" / "assets" / "base5m"
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "text, number",
    [("24\n", 24), (" 1,800.", 1800), ("-3", -3), ("18.5", 18.5), ("is 7, not 8", 7), ("none", None), ("", None)],
)
def test_the_first_number_counts(text: str, number: float | None) -> None:
    assert arithmetic.first_number(text) == number


def test_rewards() -> None:
    assert arithmetic.reward("24\n48", 24) == 1
    assert arithmetic.reward("48 24", 24) == 0
    assert arithmetic.reward("24.5", 24) == 0
    assert arithmetic.reward("", 0) == 0


def test_annotations_become_sums() -> None:
    found = arithmetic.sums_in("She sold 48/2 = <<48/2=24>>24. <<24+48=72>> <<48+24=72>> <<0.2*50=10>> <<1+2+3=6>>")
    assert [key for key, _ in found] == ["48/2", "24+48", "24+48"]
    assert found[0][1] == arithmetic.Sum(arithmetic.SHOTS + "48 / 2 = ", 24)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "gsm8k").mkdir()
    rows = [{"prompt": "", "target": f"<<{i}+{j}={i + j}>> <<{j}+{i}={i + j}>>"} for i in range(8) for j in range(8)]
    (tmp_path / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_no_sum_is_in_both_parts(folder: Path) -> None:
    train, test = arithmetic.split(folder, 10)
    assert (len(train), len(test)) == (26, 10)  # 36 sums of two numbers below 8, in whatever order they stand
    numbers = [{tuple(sorted(s.prompt.split("\n")[-1].split()[::2])) for s in part} for part in (train, test)]
    assert not numbers[0] & numbers[1]
    few, same = arithmetic.split(folder, 10, rows=4, seed=1)
    assert len(few) == 4 and same == test
    with pytest.raises(ValueError, match="at most the 36 sums"):
        arithmetic.split(folder, 10, rows=30)


def test_advantages_are_normalised_within_a_group() -> None:
    found = grpo.advantages(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1]), 4)
    assert found[:4].sum().abs() < 1e-6
    assert found[:4].std() == pytest.approx(1, abs=1e-3)
    assert found[4:].tolist() == [0, 0, 0, 0]


def test_on_policy_the_gradient_is_reinforce_and_clipping_stops_it() -> None:
    new = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    mask, advantage = torch.tensor([[True, True], [True, False]]), torch.tensor([2.0, -1.0])
    grpo.policy_loss(new, new.detach(), advantage, mask, 0.2).backward()
    torch.testing.assert_close(new.grad, -(advantage[:, None] * mask) / 3)
    far = (new.detach() + torch.tensor([[0.5], [-0.5]])).requires_grad_()  # both went further than their advantage asks
    loss = grpo.policy_loss(far, new.detach(), advantage, mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-(2 * 1.2 * 2 - 0.8) / 3)
    assert not far.grad.any()
    assert grpo.kl_term(new, new.detach(), mask) == 0
    assert grpo.kl_term(far, new.detach(), mask) > 0


def test_a_completion_ends_with_its_line() -> None:
    stops = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert policy.until_first(stops).long().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_prompts_are_shuffled_epochs() -> None:
    batches = grpo.prompts(list(range(6)), 4, 3, seed=0)
    flat = [x for batch in batches for x in batch]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list(range(6))
    assert grpo.prompts(list(range(6)), 4, 3, seed=0) == batches


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    base, tokenizer = data.load(str(BASE5M), "float32", CPU)
    small = {
        "updates": 2, "prompts": 4, "group": 4, "rank": 2, "alpha": 4, "evaluate": 10, "evaluate_every": 1,
        "measure_every": 1, "text": None, **changes,
    }  # fmt: skip
    spec = specs.complete(small)
    return {"spec": spec, **grpo.train(spec, base, data.Store(folder, tokenizer), CPU)}


@pytest.mark.skipif(not (BASE5M / "model.safetensors").exists(), reason=f"{BASE5M} is not there")
def test_runs_and_their_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(policy, "reward", lambda text, answer: float(len(text) % 2))  # any model earns some of it
    lines = tmp_path / "lines.jsonl"
    records = [run(folder), run(folder, passes=2, beta=0.1), run(folder, method="adamw", lr=1e-3, passes=2)]
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    for record in records:
        assert [step for step, _ in record["curve"]] == [0, 1, 2]
        assert len(record["rewards"]) == 2
        assert len(record["measured"]) == 2 * record["spec"]["passes"]
        assert all(math.isfinite(m["kl"]) for m in record["measured"])
        assert record["kl_from_base"] > 0
    first = records[0]["measured"][0]
    assert 0 < first["kl"] < 2 * first["bound"]
    assert records[0]["metrics"]["trust/source"] == "measured"
    assert records[1]["measured"][1]["seen_rows"] < 0.1  # a second pass over a batch looks like rows seen twice
    report.main([str(lines)])
    said = capsys.readouterr().out
    assert "2 updates, one step for each batch of samples, all training sums" in said
    assert "seen_rows" in said and "AdamW 0.001" in said
    assert len(read([str(lines)])) == 3


def test_plans_hold_no_run_twice() -> None:
    keys = [specs.key_of(spec) for plan in specs.plans().values() for spec in plan]
    assert len(keys) == len(set(keys))
    assert all(specs.price(spec) > 0 for plan in specs.plans().values() for spec in plan)
    with pytest.raises(ValueError, match="unknown keys"):
        specs.complete({"steps": 3})
