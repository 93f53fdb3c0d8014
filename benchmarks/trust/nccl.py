"""Several GPUs over NCCL: both orders of wrapping, unused parameters looked for, bit-equal parameters.

    torchrun --nproc_per_node 2 -m benchmarks.trust.nccl --model examples/assets/base5m --out nccl.jsonl

Without GPUs the processes talk through gloo. Each line says how a model was wrapped, whether all processes hold the
same bits after training, the loss, the last step's bound, and the weights' relative distance from the first line's.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from ctr_optim import CTROptimizer

WAYS = ("DDP, optimizer first", "DDP, optimizer last", "DDP, holdout and retain", "FSDP2")


def adapted(path: str, device: torch.device) -> nn.Module:
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).to(device).train()


def built(way: str, path: str, device: torch.device) -> tuple[nn.Module, CTROptimizer]:
    """The model as it is wrapped, and its optimizer; ranks do not move."""
    model = adapted(path, device)
    params = [p for p in model.parameters() if p.requires_grad]
    ids = [device.index] if device.type == "cuda" else None
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
    return torch.randint(3, 2000, (rows, 64), generator=torch.Generator().manual_seed(seed)).to(device)


def trained(way: str, path: str, steps: int, device: torch.device) -> dict[str, object]:
    rank, world = dist.get_rank(), dist.get_world_size()
    model, optimizer = built(way, path, device)
    for step in range(steps):
        rows = tokens(step, 8 * world, device)[rank::world]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)
    total /= world
    equal, whole = True, []
    for p in model.parameters():
        if p.requires_grad:
            value = p.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
            first = value.clone()
            dist.broadcast(first, 0)
            same = torch.tensor(float(torch.equal(first, value)), device=device)
            dist.all_reduce(same)
            equal &= float(same) == world
            whole.append(value.float().cpu().flatten())
    found = optimizer.metrics()
    kept = ("trust/predicted_kl", "trust/max_kl", "trust/scale", "trust/source", "trust/unbounded", "skipped_steps")
    weights = torch.cat(whole)
    return {
        "way": way, "steps": steps, "loss": float(total), "bit_equal": equal, "norm": float(weights.norm()),
        **{key: found[key] for key in kept}, "weights": weights,
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
    dist.init_process_group("nccl" if cuda else "gloo")
    reference: Tensor | None = None
    for way in WAYS:
        try:
            line = trained(way, args.model, args.steps, device)
            weights = line.pop("weights")
            reference = weights if reference is None else reference
            line["distance_from_first"] = float((weights - reference).norm() / reference.norm())
        except Exception as error:  # what fails is a result, too
            line = {"way": way, "error": f"{type(error).__name__}: {error}"[:500]}
        if dist.get_rank() == 0:
            line |= {"backend": dist.get_backend(), "processes": dist.get_world_size(), "torch": torch.__version__}
            print(json.dumps(line), flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps(line) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
