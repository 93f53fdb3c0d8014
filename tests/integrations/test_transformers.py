"""The real Trainer: an optimizer or a factory, logs, rank events, and exact resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import llama_batch, same, tiny_llama

from ctr_optim import CTROptimizer, RankScheduler
from ctr_optim.report.log import read_events

transformers = pytest.importorskip("transformers", reason="Hugging Face's Trainer is an extra")
pytest.importorskip("peft", reason="the adapters are PEFT's")
pytest.importorskip("accelerate", reason="the Trainer needs it")

from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from ctr_optim.integrations.transformers import CTRCallback, CTRFactory  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")

OPTIONS: dict[str, Any] = dict(lr=0.02, max_kl=1e-3, calibration_interval=4)
RANKS: dict[str, Any] = dict(interval=3, until=1.0, hysteresis=0.0, window=2, sketch_rank=3)


def data(n: int = 24) -> list[dict[str, Any]]:
    batch = llama_batch(n=n)
    return [{k: batch[k][i] for k in ("input_ids", "labels")} for i in range(n)]


def trainer_of(folder: Path, how: str, ranks: dict[str, Any] | None = RANKS, model: Any = None, **args: Any) -> Trainer:
    model = tiny_llama(dtype=torch.float32, task_type="CAUSAL_LM") if model is None else model
    defaults = dict(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=4, save_steps=5, logging_steps=2,
        report_to="none", use_cpu=True, disable_tqdm=True, seed=1, lr_scheduler_type="cosine",
    )  # fmt: skip
    options = {**OPTIONS, "rank_scheduler": ranks}
    kwargs: dict[str, Any] = {"optimizer_cls_and_kwargs": (CTRFactory, options)}
    if how == "optimizers":
        scheduler = None if ranks is None else RankScheduler(**ranks)
        kwargs = {
            "optimizers": (
                CTROptimizer(model.parameters(), **{**options, "rank_scheduler": scheduler}, model=model),
                None,
            )
        }
    return Trainer(
        model=model, args=TrainingArguments(**{**defaults, **args}), train_dataset=data(),
        eval_dataset=data(8), callbacks=[CTRCallback()], **kwargs,
    )  # fmt: skip


def adapter(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items() if "lora_" in k}


@pytest.mark.parametrize("how", ["factory", "optimizers"])
@pytest.mark.parametrize("stop", [5, 7])  # inside a sketch window; at the start of one
def test_resuming_after_rank_events_is_exact(tmp_path: Path, how: str, stop: int) -> None:
    whole = trainer_of(tmp_path, how, save_steps=stop)
    whole.train()
    events = read_events(tmp_path)
    before = {e["name"] for e in events if e["event"] == "rank" and e["step"] <= stop}
    assert before and any(e["step"] > stop for e in events if e["event"] == "rank")

    again = trainer_of(tmp_path, how, save_steps=100)
    assert {p.shape[0] for n, p in again.model.named_parameters() if "lora_A" in n} == {4}
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert same(adapter(whole), adapter(again))
    assert read_events(tmp_path)[-1]["ranks"] == events[-1]["ranks"]  # readers see one run
    steps = [e["step"] for e in read_events(tmp_path) if e["event"] == "log"]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("how", ["factory", "optimizers"])
def test_the_best_model_is_loaded_whatever_its_ranks(tmp_path: Path, how: str) -> None:
    best: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                best.update({k: v.clone() for k, v in kwargs["model"].state_dict().items() if "lora_" in k})

    trainer = trainer_of(
        tmp_path, how, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_steps=2,
        metric_for_best_model="runtime", greater_is_better=True,
    )  # fmt: skip
    trainer.add_callback(Keep())
    # The first evaluation is the best one.
    losses = iter(range(100, 0, -1))
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *a, **k: _with(evaluate(*a, **k), "eval_runtime", float(next(losses)))
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert any(e["event"] == "rank" for e in read_events(tmp_path))
    assert same(best, adapter(trainer))
    trainer.model.save_pretrained(tmp_path / "out")
    assert same_function(trainer.model, tmp_path / "out")


def _with(metrics: dict[str, float], key: str, value: float) -> dict[str, float]:
    return {**metrics, key: value}


def same_function(model: Any, folder: Path) -> bool:
    from peft import PeftModel

    base = tiny_llama(dtype=torch.float32, peft=False)
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    ids = llama_batch(seed=3)["input_ids"]
    with torch.no_grad():
        return torch.allclose(model.eval()(ids).logits, loaded(ids).logits, atol=1e-5)


def test_what_was_saved_after_rank_events_loads_into_plain_peft(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "factory")
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert len({p.shape[0] for n, p in trainer.model.named_parameters() if "lora_A" in n}) > 1
    assert same_function(trainer.model, tmp_path / "out")


def test_logs_reach_the_loggers(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Logger(TrainerCallback):  # like TensorBoard's and W&B's, it runs before user callbacks
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = trainer_of(tmp_path, "factory")
    trainer.callback_handler.callbacks.insert(0, Logger())
    trainer.train()
    entries = [logs for logs in seen if "loss" in logs]
    assert len(entries) == 5
    for logs in entries:
        assert {"ctr/mean_rank", "ctr/kl_from_base", "ctr/trust/scale", "ctr/trust/predicted_kl"} <= logs.keys()
        assert all(isinstance(value, (int, float)) for value in logs.values())
    assert not any("ctr/trust/scale" in logs for logs in seen if "loss" not in logs)
    history = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert [h["ctr/kl_from_base"] for h in history] == [logs["ctr/kl_from_base"] for logs in entries]
    json.dumps(trainer.state.log_history)


def test_tensorboard_holds_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard reads its own files")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(tmp_path, "factory", report_to="tensorboard", save_strategy="no")
    trainer.train()
    written = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents*")).parent)).Reload()
    logs = [e for e in read_events(tmp_path) if e["event"] == "log"]
    for key in ("kl_from_base", "trust/scale", "trust/predicted_kl", "trust/coupling"):
        found = {point.step: point.value for point in written.Scalars(f"train/ctr/{key}")}
        assert found == pytest.approx({log["step"]: log[key] for log in logs}, rel=1e-6)
    for key, of in (("mean", lambda ranks: sum(ranks) / len(ranks)), ("min", min), ("max", max)):
        found = [point.value for point in written.Scalars(f"train/ctr/{key}_rank")]
        assert found == pytest.approx([of(log["ranks"].values()) for log in logs])
    assert min(found) == 4 < max(found)


def test_the_event_log(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "factory")
    trainer.train()
    start, *events = read_events(tmp_path)
    assert start["event"] == "start" and set(start["ranks"].values()) == {4}
    logged = [e for e in events if e["event"] == "log"]
    assert [e["step"] for e in logged] == [2, 4, 6, 8, 10] and all("loss" in e for e in logged)
    ranks = dict(start["ranks"])
    for event in events:
        if event["event"] == "rank":
            assert event["old_rank"] == ranks[event["name"]]
            ranks[event["name"]] = event["new_rank"]
        else:
            assert event["ranks"] == ranks and event["kl_from_base/layer"].keys() == ranks.keys()
    assert ranks != start["ranks"]


def test_training_on_with_the_same_trainer_logs_every_event_once(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "optimizers", save_strategy="no")
    trainer.train()
    trainer.train()
    ranks = [(e["step"], e["name"]) for e in read_events(tmp_path) if e["event"] == "rank"]
    assert len(ranks) == len(set(ranks))


@pytest.mark.parametrize("total", [None, 5])
def test_the_scheduler_learns_the_length_of_the_training(tmp_path: Path, total: int | None) -> None:
    trainer = trainer_of(tmp_path, "factory", {**RANKS, "total_steps": total}, save_strategy="no")
    trainer.train()
    assert trainer.optimizer.optimizer.rank_scheduler.total_steps == (10 if total is None else 5)
    steps = [e["step"] for e in read_events(tmp_path) if e["event"] == "rank"]
    assert max(steps) == (9 if total is None else 3)


def test_the_class_itself_and_accumulation(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.float32)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=args, train_dataset=data(), optimizer_cls_and_kwargs=(CTROptimizer, dict(OPTIONS))
    )
    trainer.train()
    opt = trainer.optimizer.optimizer
    assert opt.steps == 4 and len(opt.pairs) == 14 and opt.metrics()["trust/source"] == "measured"


def test_several_gpus_in_one_process(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "optimizers", None)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"nn\.DataParallel"):
        CTRCallback().on_train_begin(trainer.args, trainer.state, trainer.control, optimizer=trainer.optimizer)


def test_another_optimizer(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "optimizers", None)
    adam = torch.optim.AdamW(trainer.model.parameters())
    with pytest.raises(TypeError, match="expected a CTROptimizer, got AdamW"):
        CTRCallback().on_train_begin(trainer.args, trainer.state, trainer.control, optimizer=adam)
