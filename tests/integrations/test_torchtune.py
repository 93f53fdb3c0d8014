"""torchtune: its own recipe with the example's YAML, and the repair of the adapter config that it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import llama_batch, llama_loss, tiny_llama, trainable
from torch import Tensor, nn

from ctr_optim import CTROptimizer, RankScheduler
from ctr_optim.cli import main
from ctr_optim.export.files import read_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHTUNE = importlib.util.find_spec("torchtune") is not None
MODEL = EXAMPLES / "assets" / "base5m"


def as_torchtune_writes(directory: Path, rank: int, alpha: int) -> None:
    """Rewrite an adapter config as torchtune writes it, with the initial rank and alpha."""
    file = directory / "adapter_config.json"
    saved = json.loads(file.read_text())
    plain = {"r": rank, "lora_alpha": alpha, "target_modules": saved["target_modules"], "peft_type": "LORA"}
    file.write_text(json.dumps(plain))


def test_the_config_gets_the_ranks_that_the_weights_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft", reason="what is repaired is for PEFT to read")
    if TORCHTUNE:
        pytest.skip("PEFT refuses the torchao that torchtune wants")
    model = tiny_llama(r=4, lora_alpha=12)
    scheduler = RankScheduler(interval=2, total_steps=4, until=1.0)
    opt = CTROptimizer(trainable(model), model=model, rank_scheduler=scheduler)
    for step in range(4):
        llama_loss(model, llama_batch(step)).backward()
        opt.step()
        opt.zero_grad()
    assert len({pair.rank for pair in opt.pairs}) > 1
    data = {k: v for k, v in llama_batch(9).items() if k != "labels"}
    expected = model(**data).logits
    model.save_pretrained(str(tmp_path))
    as_torchtune_writes(tmp_path, 4, 12)
    for _ in range(2):
        assert main(["fix-torchtune-adapter", str(tmp_path)]) == 0
    assert f"{len(opt.pairs)} layers" in capsys.readouterr().out
    again = peft.PeftModel.from_pretrained(tiny_llama(peft=False), str(tmp_path))
    torch.testing.assert_close(again(**data).logits, expected)


def test_what_is_no_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fix-torchtune-adapter", str(tmp_path)]) == 1
    assert "adapter_config.json" in capsys.readouterr().err


# -- the recipe itself ------------------------------------------------------------------------------------------------

needs_torchtune = pytest.mark.skipif(
    not TORCHTUNE,
    reason="torchtune 0.6 wants a torchao of its own; examples/torchtune/README.md makes the environment",
)


def recipe_of(out: Path, **changes: Any) -> Any:
    """Return the recipe, set up from the example's YAML with some changes."""
    import torchtune
    from omegaconf import OmegaConf

    file = Path(torchtune.__file__).parents[1] / "recipes" / "lora_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("lora_finetune_single_device", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = OmegaConf.load(EXAMPLES / "torchtune" / "base5m.yaml")
    short = ["batch_size=2", "max_steps_per_epoch=4", "dataset.max_rows=16", "optimizer.rank_scheduler.interval=2",
             "optimizer.rank_scheduler.total_steps=8", "optimizer.betas=[0.9,0.99]"]  # fmt: skip
    places = [f"output_dir={out}", f"tokenizer.folder={MODEL}", f"checkpointer.checkpoint_dir={MODEL}",
              f"dataset.path={EXAMPLES / 'assets' / 'e2e' / 'train.jsonl'}"]  # fmt: skip
    more = [f"{key}={value}" for key, value in changes.items()]
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(short + places + more))
    recipe = module.LoRAFinetuneRecipeSingleDevice(config)
    recipe.setup(config)
    return recipe


def adapter_of(out: Path) -> dict[str, Tensor]:
    """Return the adapter in torchtune's own checkpoint format."""
    return torch.load(out / "epoch_1" / "adapter_model.pt", weights_only=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Run two epochs of the recipe with one event each; return the recipe and its output folder."""
    out = tmp_path_factory.mktemp("torchtune")
    sys.path.insert(0, str(EXAMPLES / "torchtune"))
    try:
        recipe = recipe_of(out)
        assert isinstance(recipe._optimizer, CTROptimizer)
        recipe.train()
    finally:
        sys.path.remove(str(EXAMPLES / "torchtune"))
    return recipe, out


@needs_torchtune
def test_the_recipe_trains_and_ranks_move(trained: tuple[Any, Path]) -> None:
    recipe, out = trained
    opt = recipe._optimizer
    metrics = opt.metrics()
    assert opt.steps == 8 and len(opt.pairs) == 42
    assert len(set(metrics["ranks"].values())) > 1
    assert metrics["trust/source"] == "measured" and metrics["skipped_steps"] == 0
    assert 0 < metrics["kl_from_base"] < 10
    saved = adapter_of(out)
    assert {pair.name + ".lora_a.weight": pair.rank for pair in opt.pairs} == {
        name: w.shape[0] for name, w in saved.items() if "lora_a" in name
    }


@needs_torchtune
def test_the_recipe_resumes_exactly_into_other_ranks(
    trained: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    _, out = trained
    monkeypatch.syspath_prepend(str(EXAMPLES / "torchtune"))
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "epoch_1")
    recipe = recipe_of(
        tmp_path,
        resume_from_checkpoint=True,
        **{"checkpointer.adapter_checkpoint": "epoch_0/adapter_model.pt"},
        **{"checkpointer.recipe_checkpoint": "recipe_state/recipe_state.pt"},
    )
    assert recipe._optimizer.steps == 4
    assert len({pair.rank for pair in recipe._optimizer.pairs}) > 1
    recipe.train()
    expected, got = adapter_of(out), adapter_of(tmp_path)
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


@needs_torchtune
def test_the_repaired_adapter_is_the_trained_function(trained: tuple[Any, Path]) -> None:
    """The test merges the adapter itself, because PEFT rejects the torchao version that torchtune needs."""
    transformers = pytest.importorskip("transformers", reason="the base model's class")
    recipe, out = trained
    assert main(["fix-torchtune-adapter", str(out / "epoch_1")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        for layer in read_adapter(out / "epoch_1").layers:
            model.get_submodule(layer.name).weight += layer.scaling * layer.b @ layer.a
        ids = torch.arange(2, 26).view(2, 12)
        recipe._model.eval()
        ours = torch.cat(recipe._model(ids), 1)  # the recipe's model returns logits in chunks
        torch.testing.assert_close(model(ids).logits, ours, rtol=1e-3, atol=1e-3)


@needs_torchtune
def test_a_builder_that_is_none() -> None:
    from ctr_optim.integrations.torchtune import lora_model

    with pytest.raises(ValueError, match="dotted name"):
        lora_model("torchtune.models.llama3_2.no_such_builder")
