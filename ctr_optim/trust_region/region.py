"""The trust region: how far a step moves the model's predictions, and how far it may.

The Kullback-Leibler divergence per token between the model before and after a step Delta is, to second order,
``Delta^T F Delta / 2`` with F the Fisher matrix. A block-diagonal F gives the right *shape* cheaply; its *scale* leaves
out that layers and tokens move together. One number, the coupling kappa, restores the scale: ``KL ~ kappa q / 2``.
:mod:`ctr_optim.trust_region.coupling` measures it on the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctr_optim.runtime import distributed
from ctr_optim.runtime.messages import warn_unmeasured
from ctr_optim.trust_region.bound import Bound, Factors, everyday_factor, largest_factor, limit_of, observed
from ctr_optim.trust_region.coupling import Coupling
from ctr_optim.trust_region.protocols import Adapter, Step
from ctr_optim.trust_region.rows import Rows


class TrustRegion:
    """Holds a step within a bound on the KL per token between the model before and after it.

    Attributes:
        bound: how far a step may go.
        coupling: from a step's quadratic form to nats.
        rows: counts the rows of batches, for bounds that look at them.
        factors: what ``max_kl`` was multiplied by in the last step, by reason.
        limit: the last step's bound, nats per token; None for no bound.
        predicted: KL that the last step was predicted to have, nats per token.
        scale: factor in [0, 1] that the last step was multiplied by, relative to the most that it could be.
        slope: derivative of the loss along the last step before the scale.
    """

    def __init__(self, bound: Bound, coupling: Coupling) -> None:
        self.bound, self.coupling, self.rows = bound, coupling, Rows()
        self.factors: Factors = {}
        self.limit: Tensor | float | None = None
        self.predicted: Tensor | float = 0.0
        self.scale: Tensor | float = 1.0
        self.slope: Tensor | float = 0.0

    def constrain(
        self, step: Step, adapter: Adapter, groups: Sequence[dict[str, Any]], given: Factors | None = None
    ) -> Tensor:
        """``()`` the factor to multiply the whole step by, so that its predicted KL stays within the bound.

        Args:
            step: the step, its quadratic form and its slope.
            adapter: the trained part of the model, for the KL from the base model.
            groups: the parameter groups, for the schedule of the bound.
            given: more factors of the bound, by reason.
        """
        passes = self.rows.passes(step.q) if self.bound.needs_rows else None
        evidence = observed(self.bound.state, groups, step.tokens, passes)
        self.factors = {**self.bound.factors(evidence), **(given or {})}
        self.limit = limit_of(self.bound, self.factors)
        self.coupling.measure(step, self.limit, adapter)
        predicted = 0.5 * self.coupling.along(step) * step.q
        scale = torch.ones_like(predicted)
        most = largest_factor(self.bound, groups) if self.coupling.known else 1.0
        if self.limit is not None and (self.coupling.known or adapter.per_token):
            # Without a gradient only momentum is left, and the bound would stretch it to its full length.
            scale = torch.where(step.slope == 0, 0, scale_within(predicted, self.limit, most))
        if not self.coupling.known:
            factor = everyday_factor(groups)
            scale = scale.clamp_max(factor)  # the assumed bound on top would make steps far shorter than AdamW's
            if factor < 1:
                warn_unmeasured(self.coupling.source)
        self.predicted, self.scale = torch.where(scale > 0, predicted * scale.square(), 0), scale / most
        self.slope = step.slope
        return scale

    def judge(self, closure: Callable[[], Any], before: Any, maximize: bool, like: Tensor) -> None:
        """Compare the reduction that the quadratic model promised with the reduction that the closure shows.

        Args:
            closure: evaluates the loss with the parameters after the step.
            before: the loss before the step.
            maximize: whether the loss is to be maximized.
            like: a tensor on the device that processes communicate through.
        """
        if self.bound.state.max_kl is None:
            return
        promised = -float(self.scale) * float(self.slope) - float(self.predicted)
        sign = -1.0 if maximize else 1.0
        with self.coupling.quiet(), torch.enable_grad():
            after = closure()
        # every process saw its own share of the batch
        gained = torch.tensor(sign * (float(before) - float(after)), device=like.device)
        self.bound.judge(float(gained / distributed.add_up([gained])), promised)


def scale_within(predicted_kl: Tensor, bound: float | Tensor, most: float = 1.0) -> Tensor:
    """``()`` the factor in [0, most] that brings a step's predicted KL (quadratic in its length) within ``bound``.

    Exactly ``most`` where the bound holds already, so that an inactive constraint changes no bit of the step; 0 where
    the prediction is NaN.
    """
    inside = predicted_kl * most**2 <= bound
    shrink = (bound / predicted_kl.clamp_min(torch.finfo(predicted_kl.dtype).tiny)).sqrt()
    return torch.where(inside, most, shrink.clamp_max(most).nan_to_num(0.0))
