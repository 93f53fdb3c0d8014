"""What an optimizer tells of its last step, as plain floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ctr_optim.checkpoint.numbers import Counters
from ctr_optim.curvature.blocks import Block
from ctr_optim.trust_region.region import TrustRegion


def metrics_of(
    blocks: Sequence[Block],
    trust: TrustRegion,
    counters: Counters,
    ranks: Mapping[str, int],
    utility: Mapping[str, float],
) -> dict[str, Any]:
    """The dict that :meth:`ctr_optim.CTROptimizer.metrics` describes; waits for the device."""
    names = [pair.name for block in blocks for pair in block.pairs]
    shares = [share for block in blocks for share in block.kl_from_base().tolist()]
    coupling = trust.coupling
    factor = coupling.of_adapter
    by_layer = {name: factor * share for name, share in zip(names, shares, strict=True)}
    return {
        "trust/predicted_kl": float(trust.predicted),
        "trust/max_kl": trust.limit,
        "trust/scale": float(trust.scale),
        "trust/coupling": float(coupling.usual if coupling.kappa is None else coupling.kappa),
        "trust/source": coupling.source,
        "kl_from_base": sum(by_layer.values()),
        "kl_from_base/layer": by_layer,
        "ranks": dict(ranks),
        "utility": dict(utility),
        "skipped_steps": counters.skipped,
        "failed_decompositions": counters.failed,
    }
