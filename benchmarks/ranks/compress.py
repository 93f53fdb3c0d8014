"""Size and loss of trained adapters cut by ``ctr_optim.compress`` and by other methods.

    python -m benchmarks.ranks.compress --model DIR --data DIR --out compress.jsonl --slots 9
    python -m benchmarks.ranks.compress --report compress.jsonl

Every job trains one adapter (AdamW or CTROptimizer), then cuts it at every tolerance. ``compress`` measures on rows
held out of training; every figure written is measured on the test split. The other ways get the number of
parameters that ``compress`` left:

- ``svd``: singular values of ``s B A``, the smallest squares per parameter go first, over all layers;
- ``svd_uniform``: the same with one rank for all layers, the largest that has no more parameters;
- ``convert_to_lora``: PEFT's function of this name, at the rank of ``svd_uniform``;
- ``magnitude``: directions go by ``s |b_i| |a_i|`` as they are trained, over all layers;
- ``small``: an adapter of a smaller rank, trained from the start (jobs of their own).

Jobs run in worker processes, ``--slots`` on each GPU. Unstarted jobs are dropped at ``--deadline`` seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

WAYS = ("svd", "svd_uniform", "magnitude")
_DEVICE = torch.device("cpu")


def jobs_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The longest jobs first."""
    common = dict(
        model=args.model, data=args.data, steps=args.steps, batch=args.batch, held=args.held, evaluate=args.evaluate,
        tolerances=args.tolerances, adamw_lr=args.adamw_lr, refit=args.refit,
    )  # fmt: skip
    ranks = [(rank, True) for rank in sorted(args.ranks, reverse=True)] + [(rank, False) for rank in args.small]
    return [
        {**common, "task": task, "method": method, "seed": seed, "rank": rank, "cut": cut}
        for rank, cut in ranks
        for seed in range(args.seeds)
        for task in args.tasks.split(",")
        for method in args.methods.split(",")
    ]


def start_worker(places: Any) -> None:
    """Take one slot on a GPU, or the CPU."""
    global _DEVICE
    _DEVICE = torch.device(places.get())
    if _DEVICE.type == "cuda":
        torch.cuda.set_device(_DEVICE)
        torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_num_threads(1)


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Train one adapter, cut it; one record for each cut."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.quality import tasks
    from ctr_optim import CTROptimizer

    began = time.time()
    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = {split: tasks.load_rows(Path(job["data"]), job["task"], split) for split in ("train", "test")}
    train, held = tasks.validation_split(tasks.encode(rows["train"], tokenizer), job["held"])
    test = tasks.encode(rows["test"][: job["evaluate"]], tokenizer)
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).to(_DEVICE)
    rank = job["rank"]
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    params = [p for p in model.parameters() if p.requires_grad]
    opt: torch.optim.Optimizer
    if job["method"] == "ctr":
        opt = CTROptimizer(params)
    else:
        opt = torch.optim.AdamW(params, lr=job["adamw_lr"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, job["steps"])
    for data in tasks.batches(train, job["batch"], job["steps"], job["seed"], _DEVICE):
        model(**data).loss.backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
    if job["method"] == "ctr":
        opt.close()  # type: ignore[attr-defined]
    del opt
    trained = time.time() - began
    return [{**record, "train_seconds": trained} for record in cuts(job, model, held, test)]


def cuts(job: dict[str, Any], model: Any, held: list, test: list) -> list[dict[str, Any]]:
    """Records of the uncut adapter, and of every way to cut it."""
    from benchmarks.quality import tasks
    from ctr_optim import compress
    from ctr_optim.ranks.adapter import adapter_of

    def batches(examples: list) -> list[dict[str, torch.Tensor]]:
        ordered = sorted(examples, key=lambda e: len(e.ids))
        return [tasks.collate(ordered[i : i + 16], _DEVICE) for i in range(0, len(ordered), 16)]

    known = {k: job[k] for k in ("task", "method", "seed", "rank", "steps", "batch", "refit")}
    known |= {"device": _DEVICE.type, "torch": torch.__version__}
    layers = adapter_of(model, None, "benchmark")
    whole = sum(pair.rank * cost for pair, cost in zip(layers.pairs.values(), layers.costs.values(), strict=True))
    on_test = Test(model, layers, batches(test))

    def record(way: str, parameters: int, **more: Any) -> dict[str, Any]:
        return {**known, "way": way, "parameters": parameters, "share": parameters / whole, **on_test.now(), **more}

    records = [record("uncut" if job["cut"] else "small", whole)]
    for tolerance in job["tolerances"] if job["cut"] else ():
        began = time.time()
        options = {"refit": job["refit"]} if job["refit"] else {}
        done = compress(model, tolerance, batches(held), **options)
        seconds = time.time() - began
        left = done.parameters_after
        measured = {"tolerance": tolerance, "held_cost": done.cost, "held_kl": done.kl, "seconds": seconds}
        records.append(record("compress", left, **measured))
        layers.resize(layers.whole)
        for way in WAYS:
            weights, parameters = truncated(layers, way, left)
            layers.write(weights)
            records.append(record(way, parameters, tolerance=tolerance))
            layers.write(layers.whole)
        if (uniform := left // sum(layers.costs.values())) >= 1:
            records.append(
                record("convert_to_lora", uniform * sum(layers.costs.values()), tolerance=tolerance)
                | (on_test.of(converted(model, uniform)))
            )
    return records


class Test:
    """Loss of the test rows, and the KL from the adapter before it was cut; both in nats per target token."""

    def __init__(self, model: Any, layers: Any, batches: list[dict[str, torch.Tensor]]) -> None:
        from ctr_optim.ranks.measurement import Measurement

        self.layers = layers
        self.measurement = Measurement(model, batches, None, "benchmark")
        self.measurement.factors(list(layers.pairs.values()))

    def now(self) -> dict[str, float]:
        """With the adapter as it is."""
        from ctr_optim.linalg.shapes import sized

        held = {n: (p.A.detach().clone(), p.B.detach().clone()) for n, p in self.layers.pairs.items()}
        ranks = {n: len(a) for n, (a, _) in self.layers.whole.items()}
        same = {n: (sized(a, (0,), ranks[n]), sized(b, (1,), ranks[n])) for n, (a, b) in held.items()}
        small = any(len(a) != ranks[n] for n, (a, _) in held.items())
        if small:
            self.layers.resize(self.layers.whole)
        cost = self.measurement.cost(lambda: self.layers.write(self.layers.whole), lambda: self.layers.write(same))
        if small:
            self.layers.resize(held)
        return {"loss": cost.loss, "rise": cost.loss - self.measurement.loss, "kl": cost.kl}

    def of(self, weights: Any) -> dict[str, float]:
        """With other weights."""
        cost = self.measurement.cost(lambda: self.layers.write(self.layers.whole), lambda: self.layers.write(weights))
        self.layers.write(self.layers.whole)
        return {"loss": cost.loss, "rise": cost.loss - self.measurement.loss, "kl": cost.kl}


def truncated(layers: Any, way: str, parameters: int) -> tuple[Any, int]:
    """An adapter's weights cut to at most ``parameters``, and how many there are."""
    from ctr_optim.ranks.truncation import ranks_after, removals
    from ctr_optim.ranks.valuation import Existing, existing_directions

    directions = {}
    for name, pair in layers.pairs.items():
        a, b = pair.A.detach().double().cpu(), pair.scaling * pair.B.detach().double().cpu()
        if way == "magnitude":
            size = (a.norm(dim=1) * b.norm(dim=0)).square()
            order = size.argsort(descending=True)
            eye = torch.eye(len(a), dtype=a.dtype)
            directions[name] = Existing(size[order], eye[order], eye[:, order])
        else:
            directions[name] = existing_directions(a @ a.mT, b.mT @ b)
    ranks = {name: len(a) for name, (a, _) in layers.whole.items()}
    worth = {name: e.utility.tolist() for name, e in directions.items()}
    order = removals(worth, layers.costs, uniform=way == "svd_uniform")
    left = sum(rank * layers.costs[name] for name, rank in ranks.items())
    count = 0
    while left > parameters and count < len(order):
        left -= order[count].parameters
        count += 1
    return layers.cut(directions, ranks_after(order, count, ranks)), left


def converted(model: Any, rank: int) -> Any:
    """What PEFT's ``convert_to_lora`` makes of the adapter, as weights of our layers."""
    from peft import convert_to_lora

    from ctr_optim.model.registry import find_pairs

    config, saved = convert_to_lora(model, rank=rank, progressbar=False)
    weights = {}
    for pair in find_pairs(model):
        prefix = f"base_model.model.{pair.name}"
        a, b = saved[f"{prefix}.lora_A.weight"].to(pair.A), saved[f"{prefix}.lora_B.weight"].to(pair.B)
        weights[pair.name] = a, b * (config.lora_alpha / config.r / pair.scaling)
    return weights


def report(records: list[dict[str, Any]]) -> str:
    """A table: the share of parameters left and the rise of the test loss, by task, method, rank and tolerance."""
    ways = ("compress", "svd", "svd_uniform", "convert_to_lora", "magnitude")
    lines = ["| task | trained by | rank | tolerance | share | cost / tolerance | " + " | ".join(ways) + " |"]
    lines.append("|---" * (6 + len(ways)) + "|")
    cells: dict[Any, dict[str, list[dict[str, Any]]]] = {}
    for r in records:
        if r.get("way") in ways:
            key = r["task"], r["method"], r["rank"], r["tolerance"]
            cells.setdefault(key, {}).setdefault(r["way"], []).append(r)
    for key, by_way in sorted(cells.items()):
        ours = by_way["compress"]
        share = sum(r["share"] for r in ours) / len(ours)
        cost = sum(max(r["rise"], r["kl"]) for r in ours) / len(ours) / key[3]
        means = [by_way.get(way, []) for way in ways]
        rises = [f"{sum(r['rise'] for r in rs) / len(rs):+.4f}" if rs else "" for rs in means]
        task, method, rank, tolerance = key
        lines.append(
            f"| {task} | {method} | {rank} | {tolerance:g} | {share:.3f} | {cost:.2f} | " + " | ".join(rises) + " |"
        )
    lines += ["", "| task | trained by | rank | parameters | test loss |", "|---|---|---|---|---|"]
    plain: dict[Any, list[float]] = {}
    for r in records:
        if r.get("way") in ("small", "uncut"):
            plain.setdefault((r["task"], r["method"], r["rank"], r["parameters"]), []).append(r["loss"])
    for (task, method, rank, parameters), losses in sorted(plain.items()):
        lines.append(f"| {task} | {method} | {rank} | {parameters:,} | {sum(losses) / len(losses):.4f} |")
    return "\n".join(lines)


def numbers(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory with the base model")
    parser.add_argument("--data", help="a directory with TASK/train.jsonl and TASK/test.jsonl")
    parser.add_argument("--out", help="results, JSON lines; appended to")
    parser.add_argument("--report", help="print a table of these results, and do nothing else")
    parser.add_argument("--tasks", default="e2e,gsm8k,hellaswag,arc_easy")
    parser.add_argument("--methods", default="adamw,ctr")
    parser.add_argument("--ranks", type=numbers(int), default=[16, 32])
    parser.add_argument("--small", type=numbers(int), default=[1, 2, 4, 8], help="ranks of the small adapters")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tolerances", type=numbers(float), default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held", type=int, default=128, help="training rows that compress measures on")
    parser.add_argument("--evaluate", type=int, default=300, help="test rows")
    parser.add_argument("--adamw-lr", type=float, default=2e-3)
    parser.add_argument("--refit", type=int, default=0, help="steps of refit after a cut")
    parser.add_argument("--slots", type=int, default=9, help="worker processes on each GPU")
    parser.add_argument("--deadline", type=float, default=270.0, help="seconds after which no job starts")
    args = parser.parse_args()
    if args.report:
        with open(args.report) as lines:
            print(report([json.loads(line) for line in lines]))
        return
    if not (args.model and args.data and args.out):
        parser.error("--model, --data and --out are needed")
    began = time.time()
    context = multiprocessing.get_context("spawn")
    gpus = torch.cuda.device_count()
    places = [f"cuda:{i}" for _ in range(args.slots) for i in range(gpus)] or ["cpu"]
    queue = context.Queue()
    for place in places:
        queue.put(place)
    with ProcessPoolExecutor(len(places), context, start_worker, (queue,)) as pool:
        futures = {pool.submit(run, job): job for job in jobs_of(args)}
        for future in as_completed(futures):
            if time.time() - began > args.deadline:
                for other in futures:
                    other.cancel()
            if future.cancelled():
                continue
            try:
                records = future.result()
            except Exception as error:  # one job that fails must not stop the others
                records = [{**futures[future], "error": f"{type(error).__name__}: {error}"[:500]}]
            with open(args.out, "a") as out:
                out.writelines(json.dumps(record) + "\n" for record in records)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
