"""The trust region: predict the KL divergence of a step, and scale the step to keep it within a bound.

The Kullback-Leibler divergence per token between the model before and after a step Delta is, to second order,
``Delta^T F Delta / 2`` with the Fisher matrix F. A block-diagonal F gives the quadratic form q, which ignores that
layers and tokens change the predictions together. One number, the coupling kappa, corrects the scale:
``KL ~ kappa q / 2``. :mod:`ctr_optim.trust_region.coupling` measures kappa on the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ctr_optim.runtime import distributed
from ctr_optim.runtime.messages import warn_unmeasured
from ctr_optim.trust_region.bound import (
    Bound,
    Factors,
    everyday_factor,
    kl_ratio,
    largest_factor,
    limit_of,
    observed,
    rate_ratio,
)
from ctr_optim.trust_region.coupling import Coupling
from ctr_optim.trust_region.loss_scale import LossScale
from ctr_optim.trust_region.protocols import Adapter, Step
from ctr_optim.trust_region.rows import Rows


class TrustRegion:
    """Bound on the KL per token between the model before and after a step.

    Attributes:
        bound: largest KL of a step.
        coupling: ratio of a step's KL to half its quadratic form.
        loss_scale: scale of the loss, which predictions are relative to; None: they are not.
        rows: counter of training rows, for bounds that use it.
        factors: factors of ``max_kl`` in the last step, by name.
        limit: bound of the last step, in nats per token; None for no bound.
        predicted: predicted KL of the last step, in nats per token.
        scale: factor of the last step, in [0, 1], relative to its largest possible value.
        kappa: ratio of the last step's KL to ``q / 2``; None before the first step.
        slope: derivative of the loss along the last step before scaling.
    """

    def __init__(self, bound: Bound, coupling: Coupling, loss_scale: LossScale | None = None) -> None:
        self.bound, self.coupling, self.rows, self.loss_scale = bound, coupling, Rows(), loss_scale
        self.factors: Factors = {}
        self.limit: Tensor | float | None = None
        self.predicted: Tensor | float = 0.0
        self.scale: Tensor | float = 1.0
        self.kappa: Tensor | float | None = None
        self.slope: Tensor | float = 0.0

    def constrain(
        self, step: Step, adapter: Adapter, groups: Sequence[dict[str, Any]], given: Factors | None = None
    ) -> Tensor:
        """Return ``()`` the factor of the whole step that keeps its predicted KL within the bound.

        Args:
            step: the step with its quadratic form and slope.
            adapter: the trained part of the model, for the KL from the base model.
            groups: the parameter groups, for the bound's schedule.
            given: additional factors of ``max_kl``, by name.
        """
        rate = rate_ratio(groups)
        passes = self.rows.passes(step.q, kl_ratio(rate)) if self.bound.needs_rows else None
        others = self.coupling.others
        usual = None if others is None else others.expected(first=not self.coupling.known)
        evidence = observed(self.bound.state, rate, step.tokens, passes, usual)
        self._bind(self.bound.factors(evidence), given)
        farthest = largest_factor(self.bound, groups)
        relative = step if self.loss_scale is None else self.loss_scale.relative(step)
        self.coupling.measure(relative, self.limit, adapter, farthest)
        if others is not None:  # The measurement gives the ratio along this step.
            self._bind(self.bound.factors(replace(evidence, others=others.along())), given)
        kappa = self.coupling.along(relative)
        self.kappa = kappa if self.loss_scale is None else kappa * self.loss_scale.form
        predicted = 0.5 * kappa * relative.q
        scale = torch.ones_like(predicted)
        most = farthest if self.coupling.known else 1.0
        if self.limit is not None and (self.coupling.known or adapter.per_token):
            # Without a gradient only momentum is left, and the bound would stretch it to its full length.
            scale = torch.where(step.slope == 0, 0, scale_within(predicted, self.limit, most))
        if not self.coupling.known:
            factor = everyday_factor(groups)
            # Take the smaller factor, not the product with an assumed bound's: steps would be far shorter than AdamW's.
            scale = scale.clamp_max(factor)
            if factor < 1:
                warn_unmeasured(self.coupling.source)
        self.predicted, self.scale = torch.where(scale > 0, predicted * scale.square(), 0), scale / most
        self.slope = step.slope
        return scale

    def expected(self, step: Step, limit: float, groups: Sequence[dict[str, Any]]) -> Tensor:
        """Return ``()`` the usual factor of such a step, without a measurement.

        Args:
            step: the step.
            limit: bound of the step, in nats per token; ignored without a bound.
            groups: the parameter groups.
        """
        if self.bound.state.max_kl is None:
            return torch.ones_like(step.q)
        relative = step if self.loss_scale is None else self.loss_scale.relative(step)
        predicted = 0.5 * self.coupling.usually(relative) * relative.q
        return scale_within(predicted, limit, largest_factor(self.bound, groups))

    def _bind(self, factors: Factors, given: Factors | None) -> None:
        """Set the factors of the coming step and its bound."""
        self.factors = {**factors, **(given or {})}
        self.limit = limit_of(self.bound, self.factors)

    def observe(self, dtype: torch.dtype, device: torch.device) -> LossScale | None:
        """Read the scale of this step's loss and return it; None if it is not observed. All processes must call this.

        Args:
            dtype: dtype of the parameters, equal in all processes.
            device: device of collective communication.
        """
        if self.loss_scale is not None:
            wide = torch.promote_types(dtype, torch.float32)
            self.loss_scale.observe(torch.zeros((), dtype=wide, device=device))
        return self.loss_scale

    @property
    def states(self) -> list[Any]:
        """The owners of checkpoint numbers."""
        others = self.coupling.others
        found = [self.bound.state, self.coupling.state]
        found += [] if self.loss_scale is None else [self.loss_scale.state]
        found += [self.rows.state] if self.bound.needs_rows else []
        return found if others is None else [*found, others.state]

    def settle(self) -> None:
        """Update the checkpoint numbers from the device; waits for the device."""
        self.rows.settle()
        if self.loss_scale is not None:
            self.loss_scale.settle()

    def resume(self) -> None:
        """Continue from the loaded checkpoint numbers."""
        self.rows.resume()
        if self.loss_scale is not None:
            self.loss_scale.resume()

    @property
    def observing(self) -> bool:
        """Whether passes since the last step were observed."""
        return self.loss_scale is not None and self.loss_scale.observing

    def forget(self, unless: Tensor | None = None) -> None:
        """Drop the observations of passes whose gradients were cleared.

        Args:
            unless: ``()`` condition on the device; if it is true, the observations stay.
        """
        if self.loss_scale is not None:
            self.loss_scale.forget(unless)

    def judge(self, closure: Callable[[], Any], before: Any, maximize: bool, like: Tensor) -> None:
        """Adapt the bound to the actual and the predicted reduction of the loss.

        Args:
            closure: evaluates the loss with the parameters after the step.
            before: loss before the step.
            maximize: whether training maximizes the loss.
            like: tensor on the device of collective communication.
        """
        if self.bound.state.max_kl is None:
            return
        promised = -float(self.scale) * float(self.slope) - float(self.predicted)
        sign = -1.0 if maximize else 1.0
        with self.coupling.quiet(), torch.enable_grad():
            after = closure()
        # Every process has its own share of the batch, so average the reductions.
        gained = torch.tensor(sign * (float(before) - float(after)), device=like.device)
        self.bound.judge(float(gained / distributed.add_up([gained])), promised)


def scale_within(predicted_kl: Tensor, bound: float | Tensor, most: float = 1.0) -> Tensor:
    """Return ``()`` the factor in [0, most] that brings a step's predicted KL (quadratic in its length) within a bound.

    The factor is exactly ``most`` if the bound holds already, so that an inactive bound changes no bit of the step. It
    is 0 if the prediction is NaN.

    Args:
        predicted_kl: ``()`` predicted KL of the unscaled step, in nats per token.
        bound: bound in nats per token.
        most: largest factor.
    """
    inside = predicted_kl * most**2 <= bound
    shrink = (bound / predicted_kl.clamp_min(torch.finfo(predicted_kl.dtype).tiny)).sqrt()
    return torch.where(inside, most, shrink.clamp_max(most).nan_to_num(0.0))
