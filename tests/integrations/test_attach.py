"""``attach`` for every trainer, and the error if the optimizer owns none of the trainable parameters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trl import LORA, OTHERS, TEXTS, TOKENIZER, base

from ctr_optim import CTROptimizer
from ctr_optim.integrations import unwrap
from ctr_optim.integrations.transformers import CTRCallback, CTRFactory, attach

trl = pytest.importorskip("trl", reason="TRL is not a dependency; its trainers are Trainers")
datasets = pytest.importorskip("datasets", reason="TRL wants a Dataset")
peft = pytest.importorskip("peft", reason="the adapters are PEFT's")

from transformers import AutoTokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TRAINERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "SFT": ({"text": TEXTS * 2}, dict(max_length=16), {}),
    **OTHERS,
    "RLOO": OTHERS["GRPO"],
}


def trainer_of(
    name: str, folder: Path, adapter: bool = True, options: Any = None, model: Any = None, **extra: Any
) -> Any:
    """Return a trainer that adds the adapter itself (``peft_config=``), or gets a model with an adapter."""
    rows, args, more = TRAINERS[name]
    torch.manual_seed(0)
    if model is None:
        model = base() if adapter else peft.get_peft_model(base(), LORA)
    defaults = dict(output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, report_to="none")
    config = getattr(trl, f"{name}Config")
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=config(**{**defaults, **args, **(options or {})}, use_cpu=True, disable_tqdm=True, save_strategy="no"),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        peft_config=LORA if adapter else None,
        **more,
        **extra,
    )


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("adapter", [True, False], ids=["peft_config", "adapted"])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_same_call_trains_every_trainer(name: str, adapter: bool, tmp_path: Path) -> None:
    trainer = attach(trainer_of(name, tmp_path, adapter), max_kl=1e-3)
    before = adapters(trainer.model)
    trainer.train()
    optimizer = unwrap(trainer.optimizer)
    after = adapters(trainer.model)
    assert optimizer.steps == 4 and optimizer.metrics()["trust/source"] == "measured"
    assert len(optimizer.pairs) == 14
    # If the model already has an adapter, TRL adds a frozen copy, "ref", as the reference model.
    stayed = {key for key in before if "lora_B" in key and torch.equal(before[key], after[key])}
    assert stayed == {key for key in before if "lora_B.ref." in key}
    assert (tmp_path / "events.jsonl").exists()


@pytest.mark.parametrize("name", TRAINERS)
def test_an_optimizer_of_the_bare_model_is_refused(name: str, tmp_path: Path) -> None:
    """TRL adds the adapter and freezes the parameters that the optimizer owns, so nothing would train."""
    model = base()
    optimizer = CTROptimizer(model.parameters())
    trainer = trainer_of(name, tmp_path, model=model, optimizers=(optimizer, None), callbacks=[CTRCallback()])
    with pytest.raises(ValueError, match=r"owns none of the 28 parameters .*attach\(trainer"):
        trainer.train()


def test_a_second_optimizer_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of("SFT", tmp_path, adapter=False)
    trainer.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="has an optimizer already \\(SGD\\)"):
        attach(trainer)


def test_a_callback_that_is_there_is_kept(tmp_path: Path) -> None:
    trainer = attach(trainer_of("SFT", tmp_path, callbacks=[CTRCallback(tmp_path / "mine.jsonl")]))
    trainer.train()
    assert (tmp_path / "mine.jsonl").exists() and not (tmp_path / "events.jsonl").exists()


@pytest.mark.parametrize("rate, said", [(2e-4, True), (8e-2, False), (None, False)])
def test_an_ignored_rate_is_told(rate: float | None, said: bool, tmp_path: Path) -> None:
    options = {} if rate is None else {"learning_rate": rate}
    trainer = attach(trainer_of("SFT", tmp_path, options={**options, "max_steps": 1}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert said == any("ignores TrainingArguments.learning_rate=0.0002" in str(w.message) for w in caught)


def test_resuming_after_attach_loads_ranks_that_moved(tmp_path: Path) -> None:
    ranks = dict(interval=1, until=1.0, hysteresis=0.0, window=1, sketch_rank=3)
    options = dict(max_steps=4, save_steps=2)

    def trained(resume: str | None) -> dict[str, torch.Tensor]:
        trainer = trainer_of("SFT", tmp_path, options=options)
        trainer.args.save_strategy = "steps"
        attach(trainer, max_kl=1e-3, rank_scheduler=ranks).train(resume_from_checkpoint=resume)
        return adapters(trainer.model)

    whole = trained(None)
    assert {p.shape[0] for name, p in whole.items() if "lora_A" in name} != {4}
    again = trained(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_the_factory_is_the_same_call(tmp_path: Path) -> None:
    results = []
    for how in ("attach", "factory"):
        extra = dict(optimizer_cls_and_kwargs=(CTRFactory, {"max_kl": 1e-3}), callbacks=[CTRCallback()])
        trainer = trainer_of("SFT", tmp_path / how, **({} if how == "attach" else extra))
        (attach(trainer, max_kl=1e-3) if how == "attach" else trainer).train()
        results.append(adapters(trainer.model))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
