"""Win back by a few steps what a cut lost: the cut adapter learns the predictions of the uncut one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ctr_optim.optimizer import CTROptimizer
from ctr_optim.ranks.adapter import Adapter, Weights
from ctr_optim.ranks.measurement import Measurement

MAX_KL = 0.1  # the first step's bound, over the tolerance


def refit(layers: Adapter, measurement: Measurement, steps: int, tolerance: float) -> Weights:
    """Return the weights after ``steps`` steps that lower ``KL(uncut || cut)`` on the batches; they are in place, too.

    Labels play no part: rows that were trained on serve as well as others. The optimizer is CTROptimizer with a bound
    of a tenth of the tolerance, which falls along a cosine.

    Args:
        layers: cut already, in the shapes of the smaller ranks.
        measurement: with the references of the uncut adapter.
    """
    pairs = [pair for pair in layers.pairs.values() if bool(pair.A.any()) and bool(pair.B.any())]
    if pairs:
        with measurement.training(pairs) as parameters:
            optimizer = CTROptimizer(parameters, model=measurement.model, max_kl=MAX_KL * tolerance, kl_schedule="lr")
            peak = optimizer.param_groups[0]["lr"]
            try:
                for step in range(steps):
                    optimizer.param_groups[0]["lr"] = 0.5 * peak * (1 + math.cos(math.pi * step / steps))
                    measurement.divergence(step % len(measurement.batches)).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
            finally:
                optimizer.close()
    return {name: (pair.A.detach().clone(), pair.B.detach().clone()) for name, pair in layers.pairs.items()}


def halves(measurement: Measurement, reference: Callable[[], Any]) -> tuple[Measurement, Measurement]:
    """Return two measurements: of the batches to refit on, and of those that judge the result.

    Args:
        reference: writes the uncut adapter's weights, whose logits on all batches stay in memory.

    Raises:
        ValueError: for fewer than two batches, and a model whose output holds no logits.
    """
    if len(measurement.batches) < 2:
        raise ValueError(
            f"refit: got {len(measurement.batches)} batch with loss tokens, expected at least two, half of which judge "
            "the result"
        )
    if not measurement.tokens:
        raise ValueError("refit: the model's output holds no logits to learn from; leave refit at 0")
    measurement.keep_references(reference)
    count = len(measurement.batches)
    return measurement.part(range(0, count, 2)), measurement.part(range(1, count, 2))
