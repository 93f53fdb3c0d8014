"""DistributedDataParallel: each process trains a share of the batch; factors and calibration cover all shares.

    torchrun --nproc-per-node=2 examples/ddp.py

This example keeps the ranks fixed. ``ctr_optim.initialize`` can choose them before the model is wrapped.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from common import ASSETS, batches, collate, encode, load_base, load_tokenizer, read_rows, with_lora
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

from ctr_optim import CTROptimizer
from ctr_optim.report.log import EventLog


def main(argv: list[str] | None = None) -> None:
    """Train the bundled model in all processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/ddp")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    tokenizer = load_tokenizer(str(ASSETS / "base5m"))
    examples = encode(read_rows(ASSETS / "e2e" / "train.jsonl"), tokenizer, 128)
    adapted = with_lora(load_base(str(ASSETS / "base5m"), device, torch.float32), rank=8, seed=0).to(device)
    model = DistributedDataParallel(adapted)
    opt = CTROptimizer(model.parameters())
    schedule = CosineAnnealingLR(opt, T_max=args.steps)
    log = EventLog(opt, args.out)

    for step, rows in enumerate(batches(examples, 8 * world, args.steps, seed=0)):
        loss = model(**collate(rows[rank::world], tokenizer.pad_token_id, device)).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
        metrics = log.log(loss=float(loss))
        if rank == 0:
            print(f"step {step:2}  loss {float(loss):.3f}  KL from base {metrics['kl_from_base']:.4f}")
    if rank == 0:
        adapted.save_pretrained(args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
