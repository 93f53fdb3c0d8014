"""The optimizer's text summary, and the metrics of its last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ctr_optim.curvature.blocks import Block
from ctr_optim.model.pair import LoRAPair
from ctr_optim.ranks.scheduler import RankScheduler
from ctr_optim.runtime.counters import Counters
from ctr_optim.settings import Settings
from ctr_optim.trust_region.region import TrustRegion


def describe(
    groups: Sequence[Mapping[str, Any]],
    pairs: Sequence[LoRAPair],
    ranks: Mapping[str, int],
    settings: Settings,
    scheduler: RankScheduler | None,
    steps: int,
) -> str:
    """Return the optimizer's ``repr``: layers, ranks, bound, steps and parameter groups. Waits for no device."""
    paired = {id(p) for pair in pairs for p in (pair.A, pair.B)}
    others = [p for g in groups for p in g["params"] if id(p) not in paired and p.requires_grad]
    adapted = sum(pair.A.numel() + pair.B.numel() for pair in pairs)
    lines = [f"layers: {len(pairs)} LoRA layers of {adapted:,} parameters"]
    if others:
        lines[0] += f", {sum(p.numel() for p in others):,} other parameters"
    if ranks:
        spread = f"{min(ranks.values())} to {max(ranks.values())}, mean {sum(ranks.values()) / len(ranks):.2f}"
        lines.append(f"ranks: {spread}, " + ("fixed" if scheduler is None else f"every {scheduler.interval} steps"))
    bound = "none" if settings.max_kl is None else f"{settings.max_kl:g} nats per token a step"
    lines.append(f"bound: {bound} (kl_schedule={settings.kl_schedule!r}, curvature={settings.curvature!r})")
    lines.append(f"steps: {steps}")
    for index, group in enumerate(groups):
        options = {k: v for k, v in group.items() if k not in ("params", "param_names", "peak_lr", "ctr")}
        text = ", ".join(f"{k}: {float(v) if k == 'lr' else v!r}" for k, v in options.items())
        lines.append(f"group {index}: {len(group['params'])} tensors, {text}")
    return "CTROptimizer (\n" + "".join(f"    {line}\n" for line in lines) + ")"


def metrics_of(
    blocks: Sequence[Block],
    trust: TrustRegion,
    counters: Counters,
    ranks: Mapping[str, int],
    utility: Mapping[str, float],
) -> dict[str, Any]:
    """Return the numbers that :meth:`ctr_optim.CTROptimizer.metrics` documents; waits for the device."""
    names = [pair.name for block in blocks for pair in block.pairs]
    shares = [share for block in blocks for share in block.kl_from_base().tolist()]
    coupling = trust.coupling
    reasons = {f"trust/factor/{name}": float(factor) for name, factor in trust.factors.items()}
    others = None if coupling.others is None else coupling.others.along()
    if others is not None:
        reasons["trust/other_ratio"] = others
    factor = coupling.of_adapter
    by_layer = {name: factor * share for name, share in zip(names, shares, strict=True)}
    return {
        "trust/predicted_kl": float(trust.predicted),
        "trust/max_kl": None if trust.limit is None else float(trust.limit),
        "trust/scale": float(trust.scale),
        **reasons,
        "trust/coupling": float(coupling.usual if trust.kappa is None else trust.kappa),
        "trust/source": coupling.source,
        "kl_from_base": sum(by_layer.values()),
        "kl_from_base/layer": by_layer,
        "ranks": dict(ranks),
        "utility": dict(utility),
        "skipped_steps": counters.skipped,
        "failed_decompositions": counters.failed,
    }
