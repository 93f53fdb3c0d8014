"""FSDP2: each process holds a shard of the model; the optimizer gathers LoRA's gradients, not the base model.

    torchrun --nproc-per-node=2 examples/fsdp2.py
    torchrun --nproc-per-node=2 examples/fsdp2.py --resume runs/fsdp2/checkpoint

Build the optimizer after ``fully_shard``, as for every optimizer with FSDP2. The script saves and loads checkpoints
with torch.distributed.checkpoint.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import ASSETS, batches, collate, encode, load_base, load_tokenizer, read_rows, with_lora
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ctr_optim import CTROptimizer
from ctr_optim.report.log import EventLog


def main(argv: list[str] | None = None) -> None:
    """Train the sharded bundled model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/fsdp2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resume", help="folder of a checkpoint of this script")
    args = parser.parse_args(argv)

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    tokenizer = load_tokenizer(str(ASSETS / "base5m"))
    examples = encode(read_rows(ASSETS / "e2e" / "train.jsonl"), tokenizer, 128)
    model = with_lora(load_base(str(ASSETS / "base5m"), device, torch.float32), rank=8, seed=0).to(device)
    mesh = init_device_mesh(device.type, (world,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    opt = CTROptimizer(model.parameters())
    trained = StateDictOptions(ignore_frozen_params=True, strict=False)
    if args.resume:
        weights, state = get_state_dict(model, opt, options=trained)
        dcp.load({"model": weights, "optim": state}, checkpoint_id=args.resume)
        set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state, options=trained)
    log = EventLog(opt, args.out)

    for step, rows in enumerate(batches(examples, 8 * world, args.steps, seed=0)):
        if step < opt.steps:
            continue  # The checkpoint already includes this batch.
        loss = model(**collate(rows[rank::world], tokenizer.pad_token_id, device)).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        metrics = log.log(loss=loss.item())
        if rank == 0:
            print(f"step {step:2}  loss {loss.item():.3f}  KL from base {metrics['kl_from_base']:.4f}")

    weights, state = get_state_dict(model, opt, options=trained)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=Path(args.out) / "checkpoint")
    whole = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)
    adapter = get_model_state_dict(model, options=whole)  # Every process must call this; rank 0 gets the result.
    if rank == 0:
        model.save_pretrained(args.out, state_dict=adapter)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
