"""Fine-tune a pretrained language model with LoRA, with AdamW and with CTROptimizer at three rates each.

All runs start from the same weights. They alternate step by step on the same batch with the same cosine schedule, so
that their times are comparable. Forgetting is the rise of the loss on plain text: docstrings of Python's own modules,
or ``--text FILE``. The script writes to --out: ``loss.png``, ``result.json`` and the adapter of CTROptimizer at its
default rate (``adapter/``, a plain PEFT adapter).

    python examples/finetune.py                                      # the bundled 5.5M-parameter model and data
    python examples/finetune.py --model NAME --data rows.jsonl       # any causal language model; {"prompt", "target"}
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import show
import torch
import transformers
from common import ASSETS, Example, Row
from peft import PeftModel
from rich.progress import Progress
from show import Run

from ctr_optim import CTROptimizer

MODEL, DATA = str(ASSETS / "base5m"), str(ASSETS / "e2e" / "train.jsonl")
TUNED = (2e-3, 8e-3, 3.2e-2)  # factors of 4 around AdamW's best of 2e-3, 4e-3, 8e-3 and 1.6e-2 on the bundled task
EVERYDAY = (2e-4, 8e-4, 3.2e-3)
OURS = (2e-2, 8e-2, 3.2e-1)  # CTROptimizer's default rate and factors of 4 around it
DEFAULT = 8e-2
LOG_INTERVAL = 5  # steps between two calls of opt.metrics()


@dataclass
class Task:
    """Settings, data and base model that the runs share."""

    args: argparse.Namespace
    device: torch.device
    tokenizer: Any
    base: transformers.PreTrainedModel
    train: list[Example]
    test: list[Example]
    text: list[Example]
    samples: list[Row]

    def loss(self, model: torch.nn.Module, examples: list[Example], progress: Progress, what: str) -> float:
        """Return the loss per target token, in nats, and show a progress bar."""
        bar = progress.add_task(what, total=len(examples), note="")
        size, pad = 2 * self.args.batch_size, self.tokenizer.pad_token_id
        loss = common.evaluate(model, examples, size, pad, self.device, lambda n: progress.advance(bar, n))
        progress.remove_task(bar)
        return loss

    def write(self, model: torch.nn.Module) -> list[str]:
        """Return continuations of the test prompts."""
        prompts = [row["prompt"] for row in self.samples]
        return common.generate(model, self.tokenizer, prompts, self.args.sample_length) if prompts else []


@dataclass
class Contender:
    """A run in progress: its model, optimizer and schedule."""

    run: Run
    model: PeftModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=MODEL, help="folder or hub name of a causal language model")
    add("--data", default=DATA, help='jsonl rows with "prompt" and "target"')
    add("--test-data", help="jsonl rows for testing; default: the bundled test file, or 10%% of --data held out")
    add("--test-rows", type=int, default=100, help="largest number of test rows")
    add("--text", type=Path, help="plain text for forgetting; default: docstrings of Python's modules")
    add("--title", help="title of the picture and the table; default: made from the settings")
    add("--steps", type=int, default=80)
    add("--batch-size", type=int, default=12)
    add("--max-length", type=int, default=256, help="tokens per row; longer rows are cut")
    add("--rank", type=int, default=8)
    add("--targets", nargs="+", help="names of the layers that get LoRA; default: all linear layers")
    add("--lr", type=float, nargs="+", default=list(OURS), help="CTROptimizer's rates")
    add("--max-kl", type=float, help="bound on one step's KL, nats per token; default: CTROptimizer's; 0: no bound")
    add("--adamw-lr", type=float, nargs="+", help="AdamW's rates; default: three rates around its best, if known")
    add("--evaluations", type=int, default=2, help="how often a run measures the test loss")
    add("--samples", type=int, default=2, help="number of test prompts with shown generations")
    add("--sample-length", type=int, default=56, help="tokens per generation")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("demo-output"))
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="dtype of the base model")
    args = parser.parse_args()
    args.known = args.model == MODEL and args.data == DATA
    args.adamw_note = "" if args.known or args.adamw_lr else "AdamW's rates were not tuned for this model: --adamw-lr"
    args.adamw_lr = args.adamw_lr or list(TUNED if args.known else EVERYDAY)
    args.title = args.title or f"{Path(args.model).name}, {Path(args.data).parent.name}, LoRA rank {args.rank}"
    return args


def prepare(args: argparse.Namespace) -> Task:
    """Load model, tokenizer and data onto the device."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if args.dtype == "auto" else args.dtype
    tokenizer = common.load_tokenizer(args.model)
    base = common.load_base(args.model, device, getattr(torch, dtype))
    rows, test_rows = split(args)
    train, test = (common.encode(part, tokenizer, args.max_length) for part in (rows, test_rows))
    text = args.text.read_text(encoding="utf-8") if args.text else common.docstrings()
    prompts = list({row["prompt"]: row for row in test_rows}.values())[: args.samples]
    return Task(args, device, tokenizer, base, train, test, common.pieces(text, tokenizer, 128, 24), prompts)


def split(args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Return training and test rows; without a test file a tenth of the rows is held out."""
    test_data = args.test_data or (ASSETS / "e2e" / "test.jsonl" if args.data == DATA else None)
    rows = common.read_rows(args.data)
    if test_data:
        return rows, common.read_rows(test_data)[: args.test_rows]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = min(args.test_rows, max(1, len(rows) // 10))
    return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]


def contenders(task: Task) -> list[Contender]:
    """Return an adapter, an optimizer and a schedule for each rate, all on the same frozen weights."""
    args, found = task.args, []
    bound = {} if args.max_kl is None else {"max_kl": args.max_kl or None}
    for name, rates in (("AdamW", args.adamw_lr), ("CTR", args.lr)):
        for rate in rates:
            model = adapted(task).train()
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = (
                torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
                if name == "AdamW"
                else CTROptimizer(parameters, lr=rate, **bound)
            )
            cosine = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / args.steps))
            )
            found.append(Contender(Run(name, rate), model, optimizer, cosine))
    return found


def adapted(task: Task) -> PeftModel:
    """Return a copy of the model with its own LoRA layers and shared frozen weights.

    Raises:
        SystemExit: PEFT finds no layers that it can adapt.
    """
    args = task.args
    try:
        return common.with_lora(common.shared_copy(task.base), args.rank, args.seed, args.targets or "all-linear")
    except ValueError as error:
        layers = sorted({type(module).__name__ for module in task.base.modules() if not list(module.children())})
        raise SystemExit(
            f"{args.model}: PEFT found no layers for LoRA ({error})\nThe model has layers of the kinds "
            f"{', '.join(layers)}. Pass names of layers that PEFT can adapt: --targets NAME ..."
        ) from None


def step(contender: Contender, batch: common.Batch, number: int, last: bool) -> None:
    """Run one step, with the same code for both optimizers."""
    run, optimizer = contender.run, contender.optimizer
    began = time.perf_counter()
    loss = contender.model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    contender.schedule.step()
    run.train_loss.append(loss.item())
    run.step_seconds.append(time.perf_counter() - began)
    if isinstance(optimizer, CTROptimizer) and (number % LOG_INTERVAL == 0 or last):
        metrics = optimizer.metrics()
        run.metrics.append({"step": number, **{k: v for k, v in metrics.items() if not isinstance(v, dict)}})


def train(task: Task, progress: Progress) -> list[Contender]:
    """Train all runs, one step each in turn; every second round runs in the opposite order."""
    args, runs = task.args, contenders(task)
    bar = progress.add_task("training", total=args.steps * len(runs), note="")
    checks = {args.steps * (k + 1) // args.evaluations for k in range(args.evaluations)} | {args.steps}
    for number, examples in enumerate(common.batches(task.train, args.batch_size, args.steps, args.seed), 1):
        batch = common.collate(examples, task.tokenizer.pad_token_id, task.device)
        for contender in runs if number % 2 else reversed(runs):
            step(contender, batch, number, number == args.steps)
            progress.advance(bar)
        show.tell(progress, bar, [contender.run for contender in runs], number)
        if number in checks:
            for contender in runs:
                what = f"evaluating {contender.run.label}"
                contender.run.test_loss[number] = task.loss(contender.model, task.test, progress, what)
    for contender in runs:
        contender.run.text_loss = task.loss(contender.model, task.text, progress, f"text, {contender.run.label}")
    return runs


@torch.no_grad()
def check_reload(model: PeftModel, task: Task, folder: Path) -> float:
    """Save the adapter, reload it on the base model, and return the largest difference of the logits.

    Raises:
        RuntimeError: the logits differ by more than 1e-5.
    """
    model.eval().save_pretrained(folder)
    fresh = PeftModel.from_pretrained(common.shared_copy(task.base), str(folder)).eval()
    batch = common.collate(task.test[: task.args.batch_size], task.tokenizer.pad_token_id, task.device)
    difference = float((model(**batch).logits.float() - fresh(**batch).logits.float()).abs().max())
    if not difference <= 1e-5:
        raise RuntimeError(f"reloaded adapter: logits differ by up to {difference:.3g}, expected at most 1e-5")
    return difference


def main() -> None:
    began, args = time.perf_counter(), arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft uses deprecated functions of transformers.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = prepare(args)
    args.out.mkdir(parents=True, exist_ok=True)
    show.console.print(
        f"[bold]{args.title}[/] ({task.base.num_parameters() / 1e6:,.1f}M parameters): {len(task.train)} training "
        f"rows, {len(task.test)} test rows; {args.steps} steps of {args.batch_size}; {task.device}, {task.base.dtype}, "
        f"seed {args.seed}"
    )
    with show.progress_bar() as progress:
        before = Run("before", 0.0, test_loss={0: task.loss(task.base, task.test, progress, "evaluating the base")})
        before.text_loss = task.loss(task.base, task.text, progress, "text, the base")
        before.samples = task.write(task.base)
        done = train(task, progress)

    default = min((c for c in done if c.run.name == "CTR"), key=lambda c: abs(math.log(c.run.lr / DEFAULT)))
    best = min((c for c in done if c.run.name == "AdamW"), key=lambda c: c.run.last)
    for contender in (best, default):
        contender.run.samples = task.write(contender.model)
    difference = check_reload(default.model, task, args.out / "adapter")
    runs = [contender.run for contender in done]
    show.plot(runs, before, args.title, args.out / "loss.png")
    result = {"settings": vars(args), "before": asdict(before), "runs": [asdict(run) for run in runs]}
    (args.out / "result.json").write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")

    if task.samples:
        show.console.print(show.samples_table(task.samples, before, [best.run, default.run]))
    show.console.print(show.losses_table(runs, before, args.title))
    show.console.print(*show.summary(runs, default.run, args.adamw_note), sep="\n")
    show.console.print(f"Reloaded {args.out / 'adapter'} on the base: logits differ by at most {difference:g}.")
    seconds = time.perf_counter() - began
    show.console.print(f"Wrote {args.out / 'loss.png'} and {args.out / 'result.json'}. Total time: {seconds:.0f} s.")


if __name__ == "__main__":
    main()
