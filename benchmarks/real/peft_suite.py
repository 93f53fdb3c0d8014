"""PEFT's method comparison suite with CTROptimizer, on a local model and local rows.

    git clone https://github.com/huggingface/peft
    python -m benchmarks.real.peft_suite --suite peft/method_comparison/MetaMathQA --model DIR --data DIR \
        --optimizer ctr --out results

Runs the suite's own ``run.py`` and writes its results file. The changes to the suite, which is copied first:

- the optimizer type ``"ctr"``: ``create_ctr_optimizer`` of ``examples/peft/ctr.py``, as in the draft of a pull request;
- the model of ``--model`` instead of Llama-3.2-3B; a sanity check of the loss on Wikipedia that is fitted to that model
  is widened;
- rows of ``--data``: gsm8k's training rows instead of MetaMathQA, WikiText-2 instead of a sample of Wikipedia;
- ``bitsandbytes`` is replaced by an empty module where it is not installed; no run here quantises the model.

The suite needs a GPU, the ``datasets`` package, and a ``peft`` that is imported from a git checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import runpy
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quality.tasks import load_rows

DRAFT = Path(__file__).parents[2] / "examples" / "peft"
SANITY = "assert 1 < wiki_loss_before < 2"  # holds for Llama-3.2-3B
ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 32, "lora_alpha": 64, "target_modules": "all-linear"}


def problems(data: Path, split: str) -> list[dict[str, str]]:
    """Return gsm8k's rows in the form of the suite's datasets."""
    rows = []
    for row in load_rows(data, "gsm8k", split):
        question = row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer: ")
        rows.append({"question": question, "answer": " " + row["target"]})
    return rows


def paragraphs(data: Path, count: int) -> list[str]:
    """Return the first long paragraphs of WikiText-2's test split."""
    lines = (data / "wikitext2" / "test.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if len(line) > 400][:count]


def loader(data: Path) -> Callable[..., Any]:
    """Return a stand-in for ``datasets.load_dataset`` that reads local rows."""
    from datasets import Dataset, DatasetDict

    def load_dataset(name: str, *_: Any, **__: Any) -> DatasetDict:
        splits = {split: problems(data, split) for split in ("train", "test")}
        if name == "openai/gsm8k":
            return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})
        if name != "meta-math/MetaMathQA":
            raise ValueError(f"load_dataset: got {name!r}, expected one of the suite's two datasets")
        train = [
            {"query": row["question"], "response": row["answer"], "type": "GSM8K", "original_question": row["question"]}
            for row in splits["train"]
        ]
        return DatasetDict({"train": Dataset.from_list(train)})

    return load_dataset


def patched(suite: Path, data: Path) -> None:
    """Import the suite's modules, and replace their data and their choice of the optimizer."""
    sys.path[:0] = [str(suite), str(DRAFT)]
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("bitsandbytes")
        stand_in.__version__, stand_in.__path__ = "none", ["site-packages"]  # type: ignore[attr-defined]
        sys.modules["bitsandbytes"] = stand_in
    import data as suite_data  # type: ignore[import-not-found]
    import utils as suite_utils  # type: ignore[import-not-found]
    from ctr import create_ctr_optimizer  # type: ignore[import-not-found]

    if getattr(sys.modules["bitsandbytes"], "__spec__", None) is None:
        del sys.modules["bitsandbytes"]  # PEFT must not find it.

    suite_data.load_dataset = loader(data)
    suite_data.get_wiki_small = lambda num_samples=100: paragraphs(data, num_samples)
    usual, checked = suite_utils.get_optimizer_and_scheduler, suite_utils.TrainConfig.__post_init__

    def optimizer_and_scheduler(model: Any, *, optimizer_type: str, max_steps: int, **options: Any) -> Any:
        if optimizer_type != "ctr":
            return usual(model, optimizer_type=optimizer_type, max_steps=max_steps, **options)
        options.pop("lr_scheduler_arg")
        optimizer = create_ctr_optimizer(model, **options)
        warm_up = int(suite_utils.WARMUP_STEP_RATIO * max_steps)
        return optimizer, suite_utils.get_cosine_schedule_with_warmup(
            optimizer, num_warmup_steps=warm_up, num_training_steps=max_steps
        )

    def check(config: Any) -> None:
        if config.optimizer_type != "ctr":
            checked(config)

    hashed = suite_utils.get_git_hash

    def commit(module: Any) -> str | None:
        try:
            return hashed(module)
        except subprocess.CalledProcessError:  # a package in a folder that is no checkout
            return None

    suite_utils.get_git_hash = commit
    suite_utils.get_optimizer_and_scheduler = optimizer_and_scheduler
    suite_utils.TrainConfig.__post_init__ = check


def experiment(suite: Path, name: str, params: dict[str, Any]) -> Path:
    """Write the configuration of an experiment; return its folder, relative to the suite."""
    folder = Path("experiments") / "lora" / name
    (suite / folder).mkdir(parents=True)
    (suite / folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (suite / folder / "training_params.json").write_text(json.dumps(params))
    return folder


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True, help="the folder MetaMathQA of PEFT's suite")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k and wikitext2")
    parser.add_argument("--optimizer", default="ctr", help="ctr, AdamW, lora+, ...: the suite's optimizer_type")
    parser.add_argument("--lr", type=float, help="learning rate; required by all optimizers but ctr")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batch-eval", type=int, default=50)
    parser.add_argument("--eval-steps", type=int, default=250)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    name = f"{Path(args.model).name}-rank32-{args.optimizer.lower()}" + (f"-lr_{args.lr}" if args.lr else "")
    params: dict[str, Any] = {
        "model_id": args.model, "optimizer_type": args.optimizer, "max_steps": args.steps, "batch_size": args.batch,
        "batch_size_eval": args.batch_eval, "eval_steps": args.eval_steps,
        "optimizer_kwargs": {} if args.lr is None else {"lr": args.lr, "weight_decay": 0.0},
    }  # fmt: skip
    args.data, args.out = args.data.resolve(), args.out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder) / "MetaMathQA"
        shutil.copytree(args.suite, suite, ignore=shutil.ignore_patterns("results", "experiments"))
        for results in ("results", "temporary_results", "cancelled_results"):
            (suite / results).mkdir(exist_ok=True)
        program = suite / "run.py"
        source = program.read_text()
        if SANITY not in source:
            raise ValueError(f"--suite: {SANITY!r} is not in run.py; this program fits PEFT's suite of August 2026")
        program.write_text(source.replace(SANITY, "assert 1 < wiki_loss_before < 5"))
        where = experiment(suite, name, params)
        patched(suite, args.data)
        sys.argv = ["run.py", "-v", "--clean", str(where)]
        with contextlib.chdir(suite):
            runpy.run_path(str(program), run_name="__main__")
        args.out.mkdir(parents=True, exist_ok=True)
        for result in suite.glob("*results/*.json"):
            shutil.copy(result, args.out / f"{result.parent.name}--{name}.json")


if __name__ == "__main__":
    main()
