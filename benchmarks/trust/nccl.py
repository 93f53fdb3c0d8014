"""Several GPUs over NCCL: DDP in both orders of wrapping, with ``find_unused_parameters=True``, and FSDP2.

    torchrun --nproc_per_node 2 -m benchmarks.trust.nccl --model examples/assets/base5m --out nccl.jsonl

Without GPUs the processes use gloo. The first line shows a single process that trains on the rows of all processes.
Each further line shows one way of wrapping: whether all processes hold bit-equal parameters after training, first and
last loss, the measured KL of every step over its bound (median and largest), and the distance of losses and weights
from the first line. Exit code 1 means that a way failed or that parameters differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from benchmarks.trust.tiny import kl
from ctr_optim import CTROptimizer

ALONE = "one process"
WAYS = ("DDP, optimizer first", "DDP, optimizer last", "DDP, holdout and retain", "FSDP2")
ROWS, LENGTH = 8, 64  # rows and tokens per row of each process
KEPT = ("trust/predicted_kl", "trust/max_kl", "trust/scale", "trust/source", "trust/unbounded", "skipped_steps")
Line = dict[str, Any]


def adapted(path: str, device: torch.device) -> nn.Module:
    """Return the model with LoRA, equal in every process."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).to(device).train()


def built(way: str, path: str, device: torch.device) -> tuple[nn.Module, CTROptimizer]:
    """Return the wrapped model and its optimizer, without a rank scheduler."""
    model = adapted(path, device)
    params = [p for p in model.parameters() if p.requires_grad]
    ids = [device.index] if device.type == "cuda" else None
    if way == ALONE:
        return model, CTROptimizer(params)
    if way == "FSDP2":
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
        return model, CTROptimizer([p for p in model.parameters() if p.requires_grad])
    more = {}
    if "holdout" in way:
        text = list(tokens(1000, 16, device).split(4))
        more = {"holdout": text[:2], "retain": text[2:]}
    if "last" in way:
        wrapped = DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)
        return wrapped, CTROptimizer(wrapped.parameters(), **more)
    optimizer = CTROptimizer(params, **more)
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True), optimizer


def tokens(seed: int, rows: int, device: torch.device) -> Tensor:
    """Return sequences that mostly follow a rule, so that the model can learn; one token in five is random."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 2000, (rows, LENGTH), generator=generator)
    chance = torch.rand(rows, LENGTH, generator=generator)
    for t in range(1, LENGTH):
        ids[:, t] = torch.where(chance[:, t] < 0.8, 3 + (5 * ids[:, t - 1] + 3) % 1997, ids[:, t])
    return ids.to(device)


def shared(value: float, device: torch.device) -> float:
    """Return the mean over processes."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def whole_weights(model: nn.Module, device: torch.device) -> tuple[Tensor, bool]:
    """Return the gathered trained weights, and whether every process holds the same bits as the first."""
    equal, whole = True, []
    for p in model.parameters():
        if p.requires_grad:
            value = p.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
            if dist.is_initialized():
                first = value.clone()
                dist.broadcast(first, 0)
                equal &= shared(float(torch.equal(first, value)), device) == 1.0
            whole.append(value.float().cpu().flatten())
    return torch.cat(whole), equal


def trained(way: str, path: str, steps: int, device: torch.device, rank: int, world: int) -> Line:
    """Train and return the line of results, with ``weights`` and ``losses``."""
    model, optimizer = built(way, path, device)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    losses, ratios, seconds = [], [], 0.0

    def predictions(rows: Tensor) -> Tensor:
        if way == "FSDP2":  # Without it the forward reads the gathered weights of the previous forward.
            inner.reshard()
        with torch.no_grad():
            return inner(input_ids=rows).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)

    for step in range(steps):
        rows = tokens(step, ROWS * world, device)
        rows = rows if way == ALONE else rows[rank::world]
        before = predictions(rows)
        began = time.perf_counter()
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(shared(float(loss.detach()), device))
        seconds += time.perf_counter() - began
        moved = shared(kl(before, predictions(rows)), device)
        bound = optimizer.metrics()["trust/max_kl"]
        ratios.append(moved / bound if bound else float("nan"))
    weights, equal = whole_weights(model, device)
    found = optimizer.metrics()
    optimizer.close()
    return {
        "way": way, "steps": steps, "bit_equal": equal, "first_loss": losses[0], "loss": losses[-1],
        "kl_over_bound": {"median": statistics.median(ratios), "max": max(ratios), "first": ratios[0]},
        "seconds_per_step": seconds / steps, **{key: found.get(key) for key in KEPT}, "weights": weights,
        "losses": losses,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/assets/base5m")
    parser.add_argument("--out")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    reference: Line | None = None
    failed = False
    for way in (ALONE, *WAYS):
        if way == WAYS[0]:  # The single process ran without a process group.
            dist.init_process_group("nccl" if cuda else "gloo")
        try:
            line = trained(way, args.model, args.steps, device, rank, world)
            weights, losses = line.pop("weights"), line.pop("losses")
            if reference is None:
                reference = {"weights": weights, "losses": losses}
            far = weights - reference["weights"]
            line["distance_from_one_process"] = float(far.norm() / reference["weights"].norm())
            pairs = zip(losses, reference["losses"], strict=True)
            line["loss_from_one_process"] = max(abs(a / b - 1) for a, b in pairs)
            failed |= not line["bit_equal"]
        except Exception as error:  # A failure is a result, too.
            line, failed = {"way": way, "error": f"{type(error).__name__}: {error}"[:500]}, True
        if rank == 0:
            backend = dist.get_backend() if dist.is_initialized() else None
            line |= {"backend": backend, "processes": world, "torch": torch.__version__}
            line["device"] = torch.cuda.get_device_name(device) if cuda else "cpu"
            print(json.dumps(line), flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps(line) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
