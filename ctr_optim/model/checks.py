"""Set-ups in which the optimizer could not do its work, each refused with what to do instead."""

from __future__ import annotations

import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.model.discovery import live_modules
from ctr_optim.model.pair import LoRAPair
from ctr_optim.runtime import distributed
from ctr_optim.runtime.messages import users_line
from ctr_optim.settings import Settings

_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def check_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Refuse DeepSpeed's stage 3, which leaves empty shells where the weights were."""
    if any(hasattr(p, "ds_id") for p in parameters):
        raise ValueError(
            "CTROptimizer: DeepSpeed ZeRO partitions these parameters, so no layer holds its weights. LoRA's weights "
            "are few, so train with DistributedDataParallel instead"
        )


def check_sharding(parameters: Iterable[nn.Parameter], rerunning: str | None) -> None:
    """Refuse sharded parameters but for FSDP2's: one mesh of all processes, one dimension of it sharded.

    Args:
        rerunning: name of a curvature that runs backward passes of its own; None for other curvatures.
    """
    sharded = [p for p in parameters if distributed.is_sharded(p)]
    if sharded and rerunning is not None:
        raise ValueError(
            f"curvature: got {rerunning!r} with sharded parameters (FSDP2), expected 'kfac', 'gradient' or 'none'; "
            "it runs backward passes of its own, in which FSDP2 does not gather the parameters"
        )
    for mesh, placements in {distributed.layout(p) for p in sharded}:
        plain = all(type(p).__name__ in ("Shard", "Replicate") for p in placements)
        if mesh.size() != distributed.world_size() or not plain or sum(p.is_shard() for p in placements) != 1:
            raise ValueError(
                f"CTROptimizer: parameters are laid out as {placements} on a mesh of {mesh.size()} of "
                f"{distributed.world_size()} processes; expected what fully_shard makes of one mesh of all processes "
                "(FSDP2, or HSDP). Tensor and pipeline parallelism are not supported: LoRA seldom needs them"
            )
        off = next((p.device.type for p in sharded if p.device.type not in (mesh.device_type, "meta")), None)
        if off is not None:
            raise ValueError(
                f"CTROptimizer: parameters were offloaded to {off} while the model runs on {mesh.device_type}; leave "
                "out fully_shard(offload_policy=...): the trained LoRA parameters are small"
            )


def check_models(roots: Iterable[nn.Module]) -> None:
    """Refuse nn.DataParallel over several devices, whose replicas are new modules in every forward, and FSDP1."""
    fsdp1 = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    for root in roots:
        if any(isinstance(module, fsdp1) for module in root.modules()):
            raise ValueError(
                "CTROptimizer: FullyShardedDataParallel (FSDP1) flattens the parameters, so that no layer holds its "
                "weights; use FSDP2 (torch.distributed.fsdp.fully_shard; with Accelerate, fsdp_version: 2)"
            )
        if isinstance(root, nn.DataParallel) and len(root.device_ids) > 1:
            raise ValueError(
                "CTROptimizer: nn.DataParallel runs replicas that hide the layers; use DistributedDataParallel (launch "
                "with torchrun), or a single GPU"
            )


def check_ranks_can_move(pairs: Sequence[LoRAPair], roots: Iterable[nn.Module], settings: Settings) -> None:
    """Refuse ranks that cannot move: no layers, processes that would differ, or an adapter that would load wrongly.

    Args:
        pairs: LoRA layers with Kronecker factors.
        roots: the models.
        settings: options of the optimizer.
    """
    if not pairs:
        raise ValueError("rank_scheduler: needs LoRA layers and curvature='kfac'; this optimizer has none to resize")
    uses = Counter(id(pair.A) for pair in pairs)
    shared = [pair.name for pair in pairs if uses[id(pair.A)] > 1]
    if shared:
        raise ValueError(
            f"rank_scheduler: {', '.join(shared[:3])} share one A, so that a rank cannot move in one layer alone; give "
            "each layer its own A, or leave rank_scheduler out"
        )
    if settings.resize == "physical":
        check_single_process()
    if (start := changes_base(roots, pairs)) is not None:
        raise ValueError(
            f"rank_scheduler: init_lora_weights={start!r} takes the first adapter out of the base weights, and "
            "PEFT would take out one of another rank when it loads what was saved; use init_lora_weights=True (and "
            "ctr_optim.initialize for a good start), or leave rank_scheduler out"
        )


def changes_base(roots: Iterable[nn.Module], pairs: Sequence[LoRAPair]) -> str | None:
    """Return the ``init_lora_weights`` of an adapter that changed the base weights (PiSSA and similar), else None."""
    adapters = {pair.adapter for pair in pairs}
    for root in roots:
        for module in root.modules():
            configs = getattr(module, "peft_config", None)
            for name, config in configs.items() if isinstance(configs, dict) else ():
                start: Any = getattr(config, "init_lora_weights", True)
                if name in adapters and isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
                    return start
    return None


def check_single_process() -> None:
    """Refuse new shapes in several processes: DistributedDataParallel's buckets hold those that they began with."""
    if distributed.world_size() > 1:
        raise ValueError(
            f"resize: got 'physical' in a group of {distributed.world_size()} processes, expected a single process; "
            "DistributedDataParallel keeps the shapes that it began with. Use resize='masked' (or 'auto'), or move the "
            "ranks before it wraps the model (ctr_optim.initialize)"
        )


def check_agreement(options: Any, blocks: Sequence[Any]) -> None:
    """Refuse processes that would fall apart: of other options, layers or weights. Looks once, at the first step."""
    if distributed.world_size() == 1:
        return
    layers = [(pair.name, tuple(pair.A.shape), tuple(pair.B.shape)) for block in blocks for pair in block.pairs]
    like = blocks[0].H
    if not distributed.agree(zlib.crc32(repr((options, layers)).encode()), like):
        raise ValueError(
            "CTROptimizer: the processes have other options or LoRA layers than the first one, expected the same "
            f"everywhere; here: {options}, {len(layers)} layers"
        )
    if not distributed.agree(sum(float(w.double().sum()) for block in blocks for w in block.weights()), like):
        raise ValueError(
            "CTROptimizer: the processes begin with other LoRA weights than the first one, expected the same "
            "everywhere; wrap the model in DistributedDataParallel, which sends them around, or seed all alike"
        )


def check_outside_backward() -> None:
    """Refuse steps from within a backward: the layers whose turn has not come lack their gradients and statistics."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "CTROptimizer: step() was called from within a backward (optimizer-in-backward, one optimizer for each "
            "parameter); the trust region needs the whole step. Build one optimizer for all parameters and call step() "
            "after backward (torchtune: optimizer_in_bwd: False); LoRA's gradients are too small to save memory on"
        )


def check_ranks_belong_to_us(groups: Iterable[dict[str, Any]]) -> None:
    """Refuse moving ranks within Lookahead, known by the counter that it leaves in the groups."""
    if any("counter" in group for group in groups):
        raise ValueError(
            "rank_scheduler: Lookahead wraps this optimizer and keeps slow copies of the weights that it began with, "
            "which do not follow when ranks move; leave out one of the two"
        )


def shapes_must_stay(roots: Iterable[nn.Module]) -> bool:
    """Whether the layers of these models cannot change their shapes: in several processes, or in a compiled model.

    What was compiled may be a part of them, or hold them, and be younger than the optimizer: all that lives is asked.
    """
    if distributed.world_size() > 1:
        return True
    if not _anything_compiled():
        return False
    wrapper = torch._dynamo.eval_frame.OptimizedModule
    compiled = [m for m in live_modules() if isinstance(m, wrapper) or m._compiled_call_impl is not None]
    ours = {id(module) for root in roots for module in root.modules()} if compiled else set()
    return any(id(module) in ours for outer in compiled for module in outer.modules())


def _anything_compiled() -> bool:
    """Whether torch.compile may have compiled anything that still counts: the search for it takes a tenth of a second.

    Of frames it keeps count, from the last ``torch.compiler.reset()`` on; a torch that does not is taken to have.
    """
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    return dynamo is not None and getattr(dynamo, "FRAME_COUNTER", 1) != 0


def warn_if_full() -> None:
    """Warn that masked ranks have nowhere to go."""
    warnings.warn(
        "rank_scheduler: the model's shapes stay as they are here (several processes, a compiled model, or "
        "resize='masked'), and the budget fills all of them, so that no layer can grow. Give the adapters a larger r, "
        "say twice the mean rank wanted, and RankScheduler(budget=...) the mean rank",
        stacklevel=users_line(),
    )


def warn_if_blind(tokens: Tensor, finite: Tensor, pairs: Sequence[LoRAPair]) -> None:
    """Warn where layers have gradients though no forward of theirs was seen (``tokens``: infinite). Waits once."""
    if bool(torch.isinf(tokens) & finite) and any(bool(p.B.grad.any()) for p in pairs if p.B.grad is not None):
        warnings.warn(
            "CTROptimizer saw gradients, but no tokens in any LoRA layer's forward: gradients alone bound its steps. "
            "Was the model compiled and run before the optimizer was built? Then call torch.compiler.reset() after "
            "building it. Do fused kernels compute the LoRA layers? Then nothing is wrong. Is the model that runs a "
            "copy, or a replica (nn.DataParallel)? Then build the optimizer from that one.",
            stacklevel=users_line(),
        )


def warn_if_frozen(pairs: Sequence[LoRAPair]) -> None:
    """Warn that the adapter will not train: PEFT loads adapters frozen unless it is asked not to."""
    if pairs and not any(p.requires_grad for pair in pairs for p in (pair.A, pair.B)):
        adapters = sorted({pair.adapter for pair in pairs if pair.adapter is not None})
        names = f" (adapters {', '.join(adapters)})" if adapters else ""
        warnings.warn(
            f"CTROptimizer: all LoRA layers that it was given{names} are frozen, "
            "and will not train. Call requires_grad_(True) on their weights; PEFT does so with "
            "PeftModel.from_pretrained(..., is_trainable=True)",
            stacklevel=users_line(),
        )


def warn_no_event(scheduler: Any) -> None:
    """Warn that a rank scheduler moves nothing within its ``total_steps``."""
    warnings.warn(
        f"rank_scheduler: no rank event falls into a run of total_steps={scheduler.total_steps}, so that ranks never "
        f"move: events come every interval={scheduler.interval} steps from start={scheduler.start} to "
        f"until={scheduler.until} of the run; choose a smaller interval",
        stacklevel=users_line(),
    )


NO_CLOSURE = (
    "CTROptimizer: kl_schedule='adaptive' compares the loss before and after a step, and step() got no closure: the "
    "bound stays as it is. Call step(closure), or choose kl_schedule='lr' or 'constant'."
)

REPLACED = (
    "CTROptimizer: the parameters with gradients are not those that it was built with; something replaced them in its "
    "groups, as DeepSpeed ZeRO does. Train with DistributedDataParallel, or build the optimizer last, after "
    "fully_shard. Accelerate may shard the model (FSDP2) of an optimizer before its first step, not later: call "
    "accelerator.prepare(model, optimizer) first."
)


def check_not_replaced(parameters: Iterable[nn.Parameter], held: Iterable[nn.Parameter]) -> None:
    """Refuse gradients of parameters that the optimizer does not hold.

    DeepSpeed trains float32 copies for an fp16 or bf16 model: the originals keep their gradients, and what a step does
    to them is overwritten by the copies.

    Raises:
        RuntimeError: a parameter with a gradient came into the groups after the optimizer was built.
    """
    known = {id(p) for p in held}
    if any(p.grad is not None and id(p) not in known for p in parameters):
        raise RuntimeError(REPLACED)
