"""Train a cut adapter for a few steps to reproduce the predictions of the uncut adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ctr_optim.optimizer import CTROptimizer
from ctr_optim.ranks.adapter import Adapter, Weights
from ctr_optim.ranks.measurement import Measurement

MAX_KL = 0.1  # KL bound of the first step, as a fraction of the tolerance


def refit(layers: Adapter, measurement: Measurement, steps: int, tolerance: float) -> Weights:
    """Train the cut adapter to lower ``KL(uncut || cut)`` on the batches, and return its weights.

    The objective does not use labels, so rows of the training data are as good as other rows. CTROptimizer starts with
    a KL bound of a tenth of the tolerance; the bound falls with ``lr``, which follows a cosine. The model has the
    returned weights afterwards.

    Args:
        layers: the cut adapter, in the shapes of the smaller ranks.
        measurement: batches with the reference logits of the uncut adapter.
        steps: number of optimizer steps.
        tolerance: tolerance of the cut, in nats per loss token.
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
    """Split the batches in two: one measurement for the refit steps, and one for the cost of the result.

    Args:
        measurement: at least two batches with loss tokens.
        reference: writes the uncut adapter's weights into the model. Their logits on all batches stay in memory.

    Raises:
        ValueError: there are fewer than two batches, or the model's output has no logits.
    """
    if len(measurement.batches) < 2:
        raise ValueError(
            f"refit: got {len(measurement.batches)} batch with loss tokens, expected at least two: half of the batches "
            "are for the refit, the other half measures the cost. Pass more batches"
        )
    if not measurement.tokens:
        raise ValueError("refit: expected a model whose output has logits, found none; leave refit at 0")
    measurement.keep_references(reference)
    count = len(measurement.batches)
    return measurement.part(range(0, count, 2)), measurement.part(range(1, count, 2))
