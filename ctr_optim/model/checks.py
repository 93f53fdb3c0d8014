"""Checks of the user's set-up: each raises or warns about a set-up that cannot work, and says what to do instead."""

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
from ctr_optim.runtime.hooks import in_backward
from ctr_optim.runtime.messages import users_line
from ctr_optim.settings import Settings

_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def check_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Refuse parameters of DeepSpeed ZeRO stage 3, which are empty outside of forward and backward passes.

    Raises:
        ValueError: if any parameter has DeepSpeed's ``ds_id``.
    """
    if any(hasattr(p, "ds_id") for p in parameters):
        raise ValueError(
            "CTROptimizer: DeepSpeed ZeRO partitions these parameters, so no layer holds its weights. Train with "
            "DistributedDataParallel instead, or with FSDP2 if the base model is large"
        )


def check_sharding(parameters: Iterable[nn.Parameter], rerunning: str | None) -> None:
    """Refuse sharded parameters, except FSDP2's: one mesh of all processes, sharded along one mesh dimension.

    Args:
        parameters: the optimizer's parameters.
        rerunning: name of a curvature that runs its own backward passes; None for other curvatures.

    Raises:
        ValueError: for another layout, for CPU offload, or for sharded parameters with such a curvature.
    """
    sharded = [p for p in parameters if distributed.is_sharded(p)]
    if sharded and rerunning is not None:
        raise ValueError(
            f"curvature: got {rerunning!r} with sharded parameters (FSDP2), expected 'kfac', 'gradient' or 'none'; "
            "that curvature runs its own backward passes, and FSDP2 does not gather the parameters for them"
        )
    for mesh, placements in {distributed.layout(p) for p in sharded}:
        plain = all(type(p).__name__ in ("Shard", "Replicate") for p in placements)
        if mesh.size() != distributed.world_size() or not plain or sum(p.is_shard() for p in placements) != 1:
            raise ValueError(
                f"CTROptimizer: got parameters with placements {placements} on a mesh of {mesh.size()} of "
                f"{distributed.world_size()} processes; expected parameters that fully_shard (FSDP2, HSDP) shards over "
                "one mesh of all processes. Tensor and pipeline parallelism are not supported; exclude LoRA from them"
            )
        off = next((p.device.type for p in sharded if p.device.type not in (mesh.device_type, "meta")), None)
        if off is not None:
            raise ValueError(
                f"CTROptimizer: got parameters on {off}, but the model runs on {mesh.device_type}. CPU offload is not "
                "supported; leave out fully_shard(offload_policy=...), since LoRA parameters need little memory"
            )


def check_models(roots: Iterable[nn.Module]) -> None:
    """Refuse FSDP1, and nn.DataParallel over several devices: it copies the modules in every forward pass.

    Raises:
        ValueError: if a model is wrapped in either.
    """
    fsdp1 = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    for root in roots:
        if any(isinstance(module, fsdp1) for module in root.modules()):
            raise ValueError(
                "CTROptimizer: FullyShardedDataParallel (FSDP1) flattens the parameters, so no layer holds its own "
                "weights; use FSDP2 (torch.distributed.fsdp.fully_shard; with Accelerate, fsdp_version: 2)"
            )
        if isinstance(root, nn.DataParallel) and len(root.device_ids) > 1:
            raise ValueError(
                "CTROptimizer: nn.DataParallel runs replicas of the model, which carry no hooks of the optimizer; use "
                "DistributedDataParallel (launch with torchrun), or a single GPU"
            )


def check_ranks_can_move(pairs: Sequence[LoRAPair], roots: Iterable[nn.Module], settings: Settings) -> None:
    """Refuse a rank scheduler where ranks cannot move.

    Args:
        pairs: LoRA layers with Kronecker factors.
        roots: the models.
        settings: the optimizer's options.

    Raises:
        ValueError: if there are no such layers, layers share one A, physical resizing runs in several processes, or
            the adapter changed the base weights and would load wrongly.
    """
    if not pairs:
        raise ValueError(
            "rank_scheduler: needs LoRA layers and curvature='kfac'; this optimizer has no layer to resize"
        )
    uses = Counter(id(pair.A) for pair in pairs)
    shared = [pair.name for pair in pairs if uses[id(pair.A)] > 1]
    if shared:
        raise ValueError(
            f"rank_scheduler: {', '.join(shared[:3])} share one A, so the rank of one layer cannot change alone; give "
            "each layer its own A, or leave rank_scheduler out"
        )
    if settings.resize == "physical":
        check_single_process()
    if (start := changes_base(roots, pairs)) is not None:
        raise ValueError(
            f"rank_scheduler: init_lora_weights={start!r} subtracts the initial adapter from the base weights. PEFT "
            "would subtract an adapter of another rank when it loads the saved one; use init_lora_weights=True (and "
            "ctr_optim.initialize for good initial directions), or leave rank_scheduler out"
        )


def changes_base(roots: Iterable[nn.Module], pairs: Sequence[LoRAPair]) -> str | None:
    """Return the ``init_lora_weights`` of an adapter that changed the base weights (such as PiSSA), else None."""
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
    """Refuse physical resizing in several processes: DistributedDataParallel's buckets keep the initial shapes.

    Raises:
        ValueError: in a group of more than one process.
    """
    if distributed.world_size() > 1:
        raise ValueError(
            f"resize: got 'physical' in a group of {distributed.world_size()} processes, expected a single process; "
            "DistributedDataParallel keeps the initial shapes of all parameters. Use resize='masked' (or 'auto'), or "
            "set the ranks with ctr_optim.initialize before you wrap the model"
        )


def check_agreement(options: Any, blocks: Sequence[Any]) -> None:
    """Refuse processes whose options, LoRA layers or LoRA weights differ: their parameters would drift apart.

    Args:
        options: the options to compare, anything with a ``repr``.
        blocks: blocks of LoRA layers with their factors.

    Raises:
        ValueError: naming the kind of difference. Every process raises it.
    """
    if distributed.world_size() == 1:
        return
    layers = [(pair.name, tuple(pair.A.shape), tuple(pair.B.shape)) for block in blocks for pair in block.pairs]
    like = blocks[0].H
    if not distributed.agree(zlib.crc32(repr((options, layers)).encode()), like):
        raise ValueError(
            "CTROptimizer: some processes have other options or LoRA layers than the first process; build the model "
            f"and the optimizer alike in every process. This process has {options} and {len(layers)} layers"
        )
    if not distributed.agree(sum(float(w.double().sum()) for block in blocks for w in block.weights()), like):
        raise ValueError(
            "CTROptimizer: some processes start with other LoRA weights than the first process; wrap the model in "
            "DistributedDataParallel, which broadcasts the weights, or set the same seed in every process"
        )


def check_outside_backward() -> None:
    """Refuse a step during backward: some layers do not have their gradients and statistics yet.

    Raises:
        RuntimeError: if autograd is running.
    """
    if in_backward():
        raise RuntimeError(
            "CTROptimizer: step() was called from within a backward pass (optimizer-in-backward, one optimizer per "
            "parameter), but the trust region bounds the step of all parameters together. Build one optimizer for all "
            "parameters and call step() after backward() (torchtune: optimizer_in_bwd: False)"
        )


def check_ranks_belong_to_us(groups: Iterable[dict[str, Any]]) -> None:
    """Refuse a rank scheduler within Lookahead, which writes a ``counter`` to the parameter groups.

    Raises:
        ValueError: if any group has a ``counter``.
    """
    if any("counter" in group for group in groups):
        raise ValueError(
            "rank_scheduler: Lookahead wraps this optimizer and keeps slow copies of the weights. These copies keep "
            "their shapes when ranks change; leave out Lookahead or rank_scheduler"
        )


def shapes_must_stay(roots: Iterable[nn.Module]) -> bool:
    """Return whether the layers must keep their shapes: in several processes, and in compiled models.

    Users may compile a submodule or a wrapper of the model, and do so after they build the optimizer. The search
    therefore covers all live modules.
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
    """Return whether torch.compile may have compiled a frame since the last ``torch.compiler.reset()``.

    This check is fast. It avoids a search of all live modules, which takes about 0.1 seconds. The result is True for a
    torch version without a frame counter.
    """
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    return dynamo is not None and getattr(dynamo, "FRAME_COUNTER", 1) != 0


def warn_if_full() -> None:
    """Warn that masked ranks cannot grow: the rank budget uses every allocated direction."""
    warnings.warn(
        "rank_scheduler: the layers keep their shapes here (several processes, a compiled model, or resize='masked'), "
        "and the budget fills them completely, so that no layer can grow. Give the adapters a larger r, for example "
        "twice the mean rank that you want, and pass that mean rank as RankScheduler(budget=...)",
        stacklevel=users_line(),
    )


def warn_if_blind(tokens: Tensor, finite: Tensor, pairs: Sequence[LoRAPair]) -> None:
    """Warn if layers have gradients, but the hooks have seen no forward pass of any layer.

    Synchronises with the device once.

    Args:
        tokens: ``()`` tokens behind the statistics; infinite if the hooks have seen none.
        finite: ``()`` whether the gradients of this step are finite.
        pairs: the LoRA layers.
    """
    if bool(torch.isinf(tokens) & finite) and any(bool(p.B.grad.any()) for p in pairs if p.B.grad is not None):
        warnings.warn(
            "CTROptimizer saw gradients, but no tokens in any LoRA layer's forward pass, so it bounds its steps with "
            "gradients alone. If the model was compiled and run before the optimizer was built, call "
            "torch.compiler.reset() after you build the optimizer. If the model that runs is a copy or a replica "
            "(nn.DataParallel), build the optimizer from that model. If fused kernels compute the LoRA layers, ignore "
            "this warning.",
            stacklevel=users_line(),
        )


def warn_if_frozen(pairs: Sequence[LoRAPair]) -> None:
    """Warn if all LoRA layers are frozen; ``PeftModel.from_pretrained`` freezes them by default."""
    if pairs and not any(p.requires_grad for pair in pairs for p in (pair.A, pair.B)):
        adapters = sorted({pair.adapter for pair in pairs if pair.adapter is not None})
        names = f" (adapters {', '.join(adapters)})" if adapters else ""
        warnings.warn(
            f"CTROptimizer: all of its LoRA layers{names} are frozen and will not train. "
            "Call requires_grad_(True) on their weights, or load them with "
            "PeftModel.from_pretrained(..., is_trainable=True)",
            stacklevel=users_line(),
        )


def warn_no_event(scheduler: Any) -> None:
    """Warn that a rank scheduler has no rank event within its ``total_steps``."""
    warnings.warn(
        f"rank_scheduler: no rank event falls into a run of total_steps={scheduler.total_steps}, so ranks never "
        f"change. Events happen every interval={scheduler.interval} steps, from start={scheduler.start} to "
        f"until={scheduler.until} of the run; choose a smaller interval",
        stacklevel=users_line(),
    )


NO_CLOSURE = (
    "CTROptimizer: kl_schedule='adaptive' compares the loss before and after a step, but step() got no closure, so the "
    "bound does not adapt. Call step(closure), or choose kl_schedule='lr' or 'constant'."
)

REPLACED = (
    "CTROptimizer: the parameters with gradients are not the parameters that the optimizer was built with; something "
    "replaced them in its parameter groups, as DeepSpeed ZeRO does. Train with DistributedDataParallel, or build the "
    "optimizer last, after fully_shard. Accelerate can shard a model (FSDP2) only before the optimizer's first step: "
    "call accelerator.prepare(model, optimizer) before it."
)


def check_not_replaced(parameters: Iterable[nn.Parameter], held: Iterable[nn.Parameter]) -> None:
    """Refuse gradients of parameters that the optimizer does not hold.

    DeepSpeed trains float32 copies of an fp16 or bf16 model. The original parameters keep their gradients, and
    DeepSpeed overwrites every step on them with the copies.

    Raises:
        RuntimeError: a parameter with a gradient came into the groups after the optimizer was built.
    """
    known = {id(p) for p in held}
    if any(p.grad is not None and id(p) not in known for p in parameters):
        raise RuntimeError(REPLACED)
