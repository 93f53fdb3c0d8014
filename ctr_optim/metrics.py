"""What an optimizer tells of its last step, as plain floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ctr_optim.curvature.kfac import Block
from ctr_optim.trust_region.coupling import TrustRegion


def metrics_of(
    blocks: Sequence[Block],
    trust: TrustRegion,
    shared: dict[str, Any],
    ranks: Mapping[str, int],
    utility: Mapping[str, float],
) -> dict[str, Any]:
    """The dict that :meth:`ctr_optim.CTROptimizer.metrics` describes; waits for the device."""
    names = [pair.name for block in blocks for pair in block.pairs]
    shares = [share for block in blocks for share in block.kl_from_base().tolist()]
    factor = shared["base_coupling"] or trust.coupling(shared)
    by_layer = {name: factor * share for name, share in zip(names, shares, strict=True)}
    return {
        "trust/predicted_kl": float(trust.predicted),
        "trust/max_kl": trust.bound,
        "trust/scale": float(trust.scale),
        "trust/coupling": float(trust.coupling(shared) if trust.kappa is None else trust.kappa),
        "trust/source": trust.source(shared),
        "kl_from_base": sum(by_layer.values()),
        "kl_from_base/layer": by_layer,
        "ranks": dict(ranks),
        "utility": dict(utility),
        "skipped_steps": shared["skipped"],
        "failed_decompositions": shared["failed"],
    }
