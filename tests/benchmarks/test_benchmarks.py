"""Tests of the quality benchmarks: splits, scores, intervals, plans, resuming."""

from __future__ import annotations

import json
import math
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_llama
from torch import Tensor, nn

pytest.importorskip("peft", reason="the benchmarks adapt models with PEFT")

from benchmarks.quality import generation, methods, plans, protocol, report, run, sensitivity, tasks

CPU = torch.device("cpu")
ASSETS = Path(__file__).parents[2] / "examples" / "assets"


class Letters:
    """A tokenizer of lower-case letters: 0 ends a text, 1 pads, "a" is 3; every other character is 2."""

    eos_token_id, pad_token_id = 0, 1

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(t)["input_ids"] for t in text]}
        return {"input_ids": [3 + ord(c) - ord("a") if c.isalpha() else 2 for c in text]}

    def decode(self, ids: Tensor, skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + int(i) - 3) if i >= 3 else " " for i in ids if i != 1 and i != 0)


class Bigram(nn.Module):
    """A model with next-token logits from a table and the loss of transformers."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.table[input_ids]
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def rows(count: int) -> list[dict[str, Any]]:
    """Return rows in which every prompt appears three times."""
    return [{"prompt": "p" * (1 + i // 3), "target": "abc"[i % 3] * (1 + i % 2)} for i in range(count)]


def by_hand(log_p: Tensor, prompt: str, target: str) -> float:
    """Return the log-likelihood of a target after its prompt, with the end-of-text token."""
    letters = Letters()
    ids = letters(prompt)["input_ids"] + letters(target)["input_ids"] + [0]
    start = len(prompt)
    return sum(float(log_p[a, b]) for a, b in zip(ids[start - 1 :], ids[start:], strict=False))


def test_no_prompt_is_on_both_sides_of_the_split() -> None:
    examples = tasks.encode(rows(60), Letters())
    train, held = tasks.validation_split(examples, 10)
    assert not {e.row["prompt"] for e in train} & {e.row["prompt"] for e in held}
    assert len(train) + len(held) == 60
    assert 10 <= len(held) <= 12  # whole prompts
    assert tasks.validation_split(examples, 10)[1] == held


def test_every_method_sees_the_same_batches() -> None:
    examples = tasks.encode(rows(12), Letters())
    first, second = (list(tasks.batches(examples, 4, 5, 3, CPU)) for _ in range(2))
    other = list(tasks.batches(examples, 4, 5, 4, CPU))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    assert any(a["input_ids"].shape != b["input_ids"].shape or not torch.equal(a["input_ids"], b["input_ids"])
               for a, b in zip(first, other, strict=True))  # fmt: skip


def test_the_target_is_kept_and_the_prompt_cut_from_the_left() -> None:
    (example,) = tasks.encode([{"prompt": "abcdef", "target": "xyz"}], Letters(), max_length=6)
    assert example.ids == Letters()("efxyz")["input_ids"] + [0]
    assert example.labels == [-100, -100, *Letters()("xyz")["input_ids"], 0]


def test_loss_and_kl_per_token_by_hand() -> None:
    table, other = torch.randn(2, 30, 30).double()
    model, base = Bigram(table), Bigram(other)
    examples = tasks.encode(rows(9), Letters())
    total = -sum(by_hand(table.log_softmax(-1), e.row["prompt"], e.row["target"]) for e in examples)
    tokens = sum(len(e.row["target"]) + 1 for e in examples)
    assert tasks.loss_per_token(model, examples, CPU, size=4) == pytest.approx(total / tokens, rel=1e-6)
    p, q = other.log_softmax(-1), table.log_softmax(-1)
    each = (p.exp() * (p - q)).sum(-1)
    seen = [t for e in examples for t, label in zip(e.ids, e.labels[1:], strict=False) if label != -100]
    assert tasks.kl_per_token(base, model, examples, CPU, size=4) == pytest.approx(float(each[seen].mean()), rel=1e-5)
    assert tasks.kl_per_token(base, base, examples, CPU) == 0


def test_choice_accuracy_by_hand() -> None:
    table = torch.randn(30, 30)
    log_p = table.log_softmax(-1)
    questions = []
    for i in range(40):
        choices = [" " + "abcd"[(i + k) % 4] + "xyzw"[k] * (i % 2) for k in range(3)]
        questions.append({"prompt": "pqrs"[i % 4] * (1 + i % 3), "choices": choices, "label": i % 3})
    right = 0
    for row in questions:
        scores = [by_hand(log_p, row["prompt"], choice) for choice in row["choices"]]
        right += max(range(3), key=scores.__getitem__) == row["label"]
    assert 0 < right < 40
    assert tasks.choice_accuracy(Bigram(table), questions, Letters(), CPU, size=7) == right / 40


def test_padded_batches_generate_what_single_prompts_do() -> None:
    model = tiny_llama(dtype=torch.float32)
    vocab = model.config.vocab_size
    prompts = ["a", "bab", "abcd" * 2, "c"]
    assert max(i for p in prompts for i in Letters()(p)["input_ids"]) < vocab
    together = generation.generate(model, Letters(), prompts, new_tokens=5)
    alone = [generation.generate(model, Letters(), [p], new_tokens=5)[0] for p in prompts]
    assert together == alone
    assert len(set(together)) > 1


def test_overlap_counts_every_reference() -> None:
    pytest.importorskip("sacrebleu", reason="BLEU and chrF come from sacrebleu")
    references = [["the cat sat on the mat today", "a cat was sitting on the mat"], ["one two three four five six"]]
    perfect = generation.overlap(["a cat was sitting on the mat", "one two three four five six"], references)
    assert perfect == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
    worse = generation.overlap(["a cat was sitting on the mat", "one two three"], references)
    assert worse["bleu"] < 90
    assert worse["chrf"] < 90


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4\n#### 1,234", 1234), ("#### -7.5 apples 9", -7.5), ("3 then 12.", 12), ("none", None), ("####", None)],
)
def test_final_number(text: str, number: float | None) -> None:
    assert generation.final_number(text) == number


def test_exact_match_needs_a_number() -> None:
    assert generation.exact_match(["#### 5", "no", "x 8"], ["#### 5", "#### 1", "#### 9"]) == pytest.approx(1 / 3)


def test_interval_is_the_paired_t_interval() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the intervals' quantiles come from scipy")
    a, b = torch.randn(2, 6).double().tolist()
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    mean, half = report.interval([x - y for x, y in zip(a, b, strict=True)])
    assert mean - half == pytest.approx(expected.low)
    assert mean + half == pytest.approx(expected.high)


def test_steps_to_a_loss() -> None:
    curve = [[10, 3.0], [20, 2.0], [30, 1.0]]
    assert report.steps_to(curve, 1.25) == pytest.approx(27.5)
    assert report.steps_to(curve, 5.0) == 10
    assert report.steps_to(curve, 0.5) is None


def test_ranks_of_sensitivity_follow_scores_within_the_budget() -> None:
    score = {"a": 0.6, "b": 0.3, "c": 0.1}
    size = {"a": 10, "b": 10, "c": 20}
    ranks = sensitivity.allocate(score, size, rank=4)
    spent = sum(ranks[n] * size[n] for n in ranks)
    assert 4 * 40 - 20 < spent <= 4 * 40
    assert ranks["a"] > ranks["b"] > ranks["c"] >= 1
    assert max(sensitivity.allocate({"a": 1.0, "b": 1e-6}, {"a": 1, "b": 9}, rank=2).values()) == 8


def test_effective_rank_of_flat_and_peaked_diagonals() -> None:
    assert float(sensitivity.effective_rank(torch.ones(3, 5))) == pytest.approx(15, rel=1e-5)
    assert float(sensitivity.effective_rank(torch.tensor([0.0, 2.0, 0.0]))) == pytest.approx(1)


@pytest.mark.parametrize("name", list(plans.PLANS))
def test_plans_hold_each_run_once_and_only_known_methods(name: str) -> None:
    specs = plans.make(name, plans.Lines([]))
    assert len({plans.key_of(s) for s in specs}) == len(specs)
    assert {plans.complete(s)["method"] for s in specs} <= set(run.METHODS)
    costs = [plans.cost(s) for s in specs]
    assert costs == sorted(costs, reverse=True)
    assert specs or name == "extend"


def test_a_final_run_never_has_a_seed_or_a_split_of_tuning() -> None:
    for name in ("final", "task_table", "peers", "pareto", "ablation"):
        for spec in map(plans.complete, plans.make(name, plans.Lines([]))):
            assert spec["split"] == "test"
            assert spec["seed"] < plans.TUNING_SEED


def tuning(method: str, losses: dict[float, float], **setting: Any) -> list[dict[str, Any]]:
    spec = {**plans.E2E, "method": method, "seed": plans.TUNING_SEED, **setting}
    return [{"spec": {**spec, "lr": lr}, "loss": loss} for lr, loss in losses.items()]


def test_best_rates_and_grids_that_are_too_short() -> None:
    records = tuning("adamw", {1e-3: 3.0, 2e-3: 2.0, 4e-3: math.nan}) + tuning("muon", {1e-2: 1.5, 2e-2: 1.0})
    records += tuning("muon", {5e-3: 1.0}, rank=2)
    records.append({"spec": {**records[0]["spec"], "lr": 9.0}, "error": "diverged"})
    lines = plans.Lines(records)
    assert lines.rate({**plans.E2E, "method": "adamw"}) == 2e-3
    assert lines.rate({**plans.E2E, "method": "muon", "rank": 4}) in (5e-3, 2e-2)
    assert lines.rate({**plans.E2E, "method": "muon", "rank": 2}) == 5e-3
    assert lines.rate({**plans.TASKS[0], "method": "muon"}) == 2e-2  # from another task, at the same rank
    assert lines.best_three() == ["adamw", "muon"]
    further = {(s["method"], s["rank"], s["lr"]) for s in lines.at_edge()}
    assert ("muon", 8, 4e-2) in further
    assert not any(method == "adamw" for method, *_ in further)


def test_equal_runs_have_equal_keys_and_unknown_keys_are_refused() -> None:
    assert plans.key_of({"method": "ctr"}) == plans.key_of(dict(reversed(plans.complete({}).items())))
    with pytest.raises(ValueError, match=r"unknown keys \['learning_rate'\]"):
        plans.complete({"learning_rate": 1})


def test_a_cut_off_line_is_run_again(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    first, second = ({**plans.complete({}), "seed": seed} for seed in (0, 1))
    run.append(str(out), {"spec": first, "loss": 1.0})
    with out.open("a") as file:
        file.write(json.dumps({"spec": second})[:-9])
    assert run.finished(str(out)) == {plans.key_of(first)}
    assert [r["spec"]["seed"] for r in plans.read([str(out)])] == [0]


def test_a_worker_writes_runs_and_failures_and_begins_nothing_too_late(tmp_path: Path) -> None:
    model = ASSETS / "base5m"
    if not (model / "model.safetensors").exists():
        pytest.skip(f"{model} does not exist")
    out = str(tmp_path / "lines.jsonl")
    spec = plans.complete({"steps": 1, "batch": 2, "rank": 2, "held": 16, "evaluate": 8, "score": ["kl_from_base"]})
    specs = [{**spec, "method": "ctr"}, {**spec, "method": "adamw", "lr": 1e-3}, {**spec, "method": "no such"}]
    for deadline, expected in ((math.inf, ["ctr", "adamw", "no such"]), (0.0, [])):
        waiting: queue.Queue = queue.Queue()
        for item in [*specs, None]:
            waiting.put(item)
        Path(out).unlink(missing_ok=True)
        run._work(waiting, out, str(ASSETS), str(ASSETS), deadline)
        records = plans.read([out]) if Path(out).exists() else []
        assert [r["spec"]["method"] for r in records] == expected
        if records:
            assert all(math.isfinite(r["loss"]) and r["score"]["kl_from_base"] >= 0 for r in records[:2])
            assert records[0]["parameters"] == records[1]["parameters"]
            assert "no such" in records[2]["error"]


def test_a_report_pairs_runs_by_seed() -> None:
    pytest.importorskip("scipy", reason="the intervals' quantiles come from scipy")
    setting = {**plans.E2E, "split": "test", "evaluate": 1000}
    records = []
    for seed in range(3):
        for method, lr, offset in (("ctr", None, 0.0), ("adamw", 8e-3, 0.25)):
            spec = {**setting, "method": method, "lr": lr, "seed": seed}
            records.append({"spec": spec, "loss": 1.0 + 0.1 * seed + offset, "curve": []})
    text = report.report(records)
    assert "| CTROptimizer | 1.1000 | 0.1000 | 3 |  |" in text
    assert "| adamw 0.008 | 1.3500 | 0.1000 | 3 | +0.2500 ± 0.0000 |" in text


def test_targets_are_read_off_the_runs() -> None:
    pytest.importorskip("scipy", reason="the intervals' quantiles come from scipy")
    lines = plans.Lines([])
    records = []
    for spec in map(plans.complete, plans.make("final", lines)):
        if spec["steps"]:
            loss = {"ctr": 0.9, "adamw": 1.0}.get(spec["method"], 0.95) + 0.01 * spec["seed"]
            records.append({"spec": spec, "loss": loss, "curve": [[30, loss + 0.2], [60, loss]]})
    (row,) = [line for line in report.targets(records, lines) if line.startswith("| e2e, base30m")]
    _, _, _, from_best, from_adamw, steps, _ = (cell.strip() for cell in row.split("|"))
    assert from_best == "-5.2 ± 0.0 %"  # 0.05 of 0.97
    assert from_adamw == "-9.8 ± 0.0 %"  # 0.1 of 1.02
    assert steps == "15 % of 300"  # half-way between 30 and 60
    records += [{"spec": {**plans.E2E, "lr": lr, "seed": plans.TUNING_SEED}, "loss": loss}
                for lr, loss in ((2e-2, 1.01), (8e-2, 1.0), (0.32, 1.0))]  # fmt: skip
    assert "16-fold range of learning rates its worst loss is 1.00 % above" in report.targets(records, lines)[-1]


def test_old_lines_are_run_again_with_what_they_held_out() -> None:
    old = {"method": "ctr", "task": "boolq", "evaluate": 1500, "seed": 3}
    (spec,) = plans.again([{"spec": old, "loss": 1.0}])
    assert spec == {**old, "held": 1500}
    assert "| CTROptimizer | 1.0000 |" in report.report_all([{"spec": old, "loss": 1.0}])


def test_protocol_sorts_tasks_and_reads_rates(tmp_path: Path) -> None:
    for task, splits in {"a": ("train", "test"), "b": ("test",)}.items():
        (tmp_path / task).mkdir()
        for split in splits:
            (tmp_path / task / f"{split}.jsonl").write_text('{"prompt": "p", "target": "t", "choices": ["t"]}\n')
    assert protocol.sort_tasks(tmp_path, ["a", "b", "c"]) == (["a"], ["b"], ["c"])
    assert protocol.score_of(tmp_path, "a") == ["accuracy"]
    assert protocol.parse_rates(["adamw=1e-3:2e-3", "dora=5"]) == {"adamw": [1e-3, 2e-3], "dora": [5.0]}
    with pytest.raises(ValueError, match="expected METHOD=RATE"):
        protocol.parse_rates(["adamw"])


def test_the_default_bound_with_other_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "BOUNDS", bounds := dict(methods.BOUNDS))
    name = methods.changed_bound({"outside": 0.03, "enough": 64})
    bound = bounds[name](0.1)
    assert (bound.outside, bound.enough, bound.repeats) == (0.03, 64.0, methods.Auto.repeats)
    assert bound.needs_others and methods.Auto.outside == math.inf
    with pytest.raises(ValueError, match="inside"):
        methods.changed_bound({"inside": 1.0})
