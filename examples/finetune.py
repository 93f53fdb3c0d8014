"""Fine-tune a pretrained language model with LoRA, once with AdamW and once with CTROptimizer, and compare.

Both runs start from the same weights and see the same batches under the same cosine schedule. Written to --out:
``loss.png``, ``result.json`` and the adapter trained by CTROptimizer (``adapter/``, a plain PEFT adapter).

    python examples/finetune.py                                      # the bundled 5M-parameter model and data
    python examples/finetune.py --model NAME --data rows.jsonl       # any causal language model; {"prompt", "target"}
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common
import matplotlib
import torch
import transformers
from common import ASSETS, Example, Row
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ctr_optim import CTROptimizer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

console = Console(width=None if Console().is_terminal else 110, highlight=False)
COLORS = {"AdamW": "#8a8f98", "CTR": "#c2410c"}
Maker = Callable[[list[torch.nn.Parameter], argparse.Namespace], torch.optim.Optimizer]
LOG_INTERVAL = 5  # steps between two looks at opt.metrics()


@dataclass
class Task:
    """All that both runs share."""

    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any
    train: list[Example]
    test: list[Example]
    samples: list[Row]

    def base(self) -> transformers.PreTrainedModel:
        return common.load_base(self.args.model, self.device, self.dtype)

    def test_loss(self, model: torch.nn.Module) -> float:
        return common.evaluate(model, self.test, 2 * self.args.batch_size, self.tokenizer.pad_token_id, self.device)

    def write(self, model: torch.nn.Module) -> list[str]:
        return common.generate(model, self.tokenizer, [row["prompt"] for row in self.samples], self.args.sample_length)


@dataclass
class Run:
    """What one optimizer made of the task."""

    name: str
    lr: float
    train_loss: list[float] = field(default_factory=list)
    test_loss: dict[int, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ASSETS / "base5m"), help="folder or hub name of a causal language model")
    add("--data", default=str(ASSETS / "e2e" / "train.jsonl"), help='jsonl rows with "prompt" and "target"')
    add("--test-data", help="the same for testing; default: the bundled test file, or 10%% of --data held out")
    add("--steps", type=int, default=120)
    add("--batch-size", type=int, default=12)
    add("--max-length", type=int, default=256, help="tokens; longer rows are cut")
    add("--rank", type=int, default=8)
    add("--lr", type=float, help="of CTROptimizer; default: its own")
    add("--max-kl", type=float, help="bound on one step's KL, nats per token; default: its own; 0: no bound")
    add(
        "--adamw-lr", type=float, default=8e-3, help="default: the best of 2e-3, 4e-3, 8e-3, 1.6e-2 on the bundled task"
    )
    add("--evaluations", type=int, default=2, help="times that the test loss is measured during a run")
    add("--samples", type=int, default=2, help="test prompts to show generations for")
    add("--sample-length", type=int, default=56, help="tokens")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("demo-output"))
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the frozen base model")
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> Task:
    """Device, data and tokenizer."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if args.dtype == "auto" else args.dtype
    tokenizer = common.load_tokenizer(args.model)
    rows, test_rows = split(args)
    train, test = (common.encode(part, tokenizer, args.max_length) for part in (rows, test_rows))
    prompts = {row["prompt"]: row for row in test_rows}
    return Task(args, device, getattr(torch, dtype), tokenizer, train, test, list(prompts.values())[: args.samples])


def split(args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Training and test rows; without a test file a tenth of the rows (300 at most) is held out."""
    bundled = args.data == str(ASSETS / "e2e" / "train.jsonl")
    test_data = args.test_data or (ASSETS / "e2e" / "test.jsonl" if bundled else None)
    rows = common.read_rows(args.data)
    if test_data:
        return rows, common.read_rows(test_data)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = min(300, max(1, len(rows) // 10))
    return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]


def adamw(parameters: list[torch.nn.Parameter], args: argparse.Namespace) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=args.adamw_lr, weight_decay=0.0)


def ctr(parameters: list[torch.nn.Parameter], args: argparse.Namespace) -> torch.optim.Optimizer:
    given = {"lr": args.lr, "max_kl": args.max_kl}
    options = {name: value for name, value in given.items() if value is not None}
    if options.get("max_kl") == 0:
        options["max_kl"] = None
    return CTROptimizer(parameters, **options)


def train(name: str, make: Maker, task: Task, progress: Progress) -> tuple[Run, PeftModel]:
    """One fine-tuning run: the same loop whatever the optimizer."""
    args = task.args
    model = common.with_lora(task.base(), args.rank, args.seed).train()
    optimizer = make([p for p in model.parameters() if p.requires_grad], args)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / args.steps)))
    run = Run(name, optimizer.param_groups[0]["lr"])
    bar = progress.add_task(f"{name:5}", total=args.steps, loss="", trust="")
    evaluation_steps = {args.steps * (k + 1) // args.evaluations for k in range(args.evaluations)} | {args.steps}

    for step, examples in enumerate(common.batches(task.train, args.batch_size, args.steps, args.seed), 1):
        began = time.perf_counter()
        loss = model(**common.collate(examples, task.tokenizer.pad_token_id, task.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        run.train_loss.append(loss.item())
        run.step_seconds.append(time.perf_counter() - began)

        if isinstance(optimizer, CTROptimizer) and (step % LOG_INTERVAL == 0 or step == args.steps):
            metrics = optimizer.metrics()
            run.metrics.append({"step": step, **{k: v for k, v in metrics.items() if not isinstance(v, dict)}})
        if step in evaluation_steps:
            run.test_loss[step] = task.test_loss(model)
        show(progress, bar, run, step)
    run.samples = task.write(model)
    return run, model


def show(progress: Progress, bar: Any, run: Run, step: int) -> None:
    """Bring the progress bar up to date; where there is no terminal to draw on, print a line now and then."""
    loss, trust = f"loss {statistics.fmean(run.train_loss[-10:]):.3f}", ""
    if run.metrics:
        last = run.metrics[-1]
        trust = f"KL from base {last['kl_from_base']:.3f}  trust scale {last['trust/scale']:.2f}"
    progress.update(bar, completed=step, loss=loss, trust=trust)
    if not console.is_terminal and step % 20 == 0:
        console.print(f"{run.name:5} step {step:4}  {loss}  {trust}")


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"), TextColumn("[dim]{task.fields[trust]}"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip


@torch.no_grad()
def check_reload(model: PeftModel, task: Task, folder: Path) -> float:
    """Save the adapter, load it onto a fresh base model, and insist on the same logits."""
    model.eval().save_pretrained(folder)
    fresh = PeftModel.from_pretrained(task.base(), str(folder)).eval()
    batch = common.collate(task.test[: task.args.batch_size], task.tokenizer.pad_token_id, task.device)
    difference = float((model(**batch).logits.float() - fresh(**batch).logits.float()).abs().max())
    if not difference <= 1e-5:
        raise RuntimeError(f"the reloaded adapter is not the trained one: logits differ by up to {difference:.3g}")
    return difference


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the last ``window`` values, fewer at the start."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def plot(runs: list[Run], start: float, title: str, path: Path) -> None:
    """Training loss (smoothed) as lines, test loss as marks."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for run in runs:
        steps = range(1, len(run.train_loss) + 1)
        style = {"color": COLORS[run.name], "markeredgecolor": "white", "markersize": 8}
        axes.plot(steps, smooth(run.train_loss, 10), **style, label=f"{run.name}, lr {run.lr:g}: training")
        marks = {0: start, **run.test_loss}
        axes.plot(list(marks), list(marks.values()), "o", **style, label=f"{run.name}: test")
    axes.set(xlabel="step", ylabel="loss per target token (nats)", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def losses_table(runs: list[Run], start: float) -> Table:
    table = Table(title="Loss per target token on the test rows", title_justify="left")
    steps = sorted(runs[0].test_loss)
    for column in ("optimizer", "lr", "before", *(f"step {step}" for step in steps), "ms per step (median)"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for run in runs:
        cells = [f"{loss:.3f}" for loss in (start, *(run.test_loss[step] for step in steps))]
        table.add_row(run.name, f"{run.lr:g}", *cells, f"{1000 * statistics.median(run.step_seconds):.0f}")
    return table


def samples_table(task: Task, before: list[str], runs: list[Run]) -> Table:
    table = Table(title="Generations on test prompts (greedy)", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for i, row in enumerate(task.samples):
        table.add_row("[bold]prompt", f"[bold]{escape(row['prompt'].strip())}")
        table.add_row("reference", escape(row["target"]))
        table.add_row("before", escape(before[i]))
        for run in runs:
            table.add_row(run.name, escape(run.samples[i]))
        table.add_section()
    return table


def trust_summary(run: Run) -> str:
    """How the trust region acted, from the steps that were looked at."""
    last, limited = run.metrics[-1], [m for m in run.metrics if m["trust/scale"] < 1]
    return (
        f"Trust region: the bound shortened {len(limited)} of {len(run.metrics)} steps looked at; median scale "
        f"{statistics.median(m['trust/scale'] for m in run.metrics):.2f}; coupling {last['trust/coupling']:.0f} "
        f"({last['trust/source']}); KL from base at the end {last['kl_from_base']:.3f} nats per token (estimated)."
    )


def main() -> None:
    began, args = time.perf_counter(), arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between transformers and peft; not ours to mend
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = prepare(args)
    args.out.mkdir(parents=True, exist_ok=True)
    base = task.base()
    name = Path(args.model).name
    console.print(
        f"[bold]{name}[/] ({base.num_parameters() / 1e6:,.1f}M parameters), LoRA rank {args.rank} on linear layers; "
        f"{len(task.train)} training rows, {len(task.test)} test rows; {args.steps} steps of {args.batch_size}; "
        f"{task.device}, {task.dtype}, seed {args.seed}"
    )
    start, before = task.test_loss(base), task.write(base)
    del base

    with progress_bar() as progress:
        adamw_run, _ = train("AdamW", adamw, task, progress)
        ctr_run, model = train("CTR", ctr, task, progress)
    runs = [adamw_run, ctr_run]

    difference = check_reload(model, task, args.out / "adapter")
    title = f"{name}, LoRA rank {args.rank}, {Path(args.data).parent.name}, seed {args.seed}"
    plot(runs, start, title, args.out / "loss.png")
    result = {"settings": vars(args), "before": start, "runs": [asdict(run) for run in runs]}
    (args.out / "result.json").write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")

    console.print(samples_table(task, before, runs), losses_table(runs, start), trust_summary(ctr_run), sep="\n")
    console.print(f"Reloaded {args.out / 'adapter'} on a fresh base: logits differ by at most {difference:g}.")
    seconds = time.perf_counter() - began
    console.print(f"Wrote {args.out / 'loss.png'} and {args.out / 'result.json'}. {seconds:.0f} s in all.")


if __name__ == "__main__":
    main()
