"""A metric from gradients alone, for parameters without Kronecker factors.

Adam's second moments estimate the diagonal of ``E[g^2]`` over batches. For mean gradients of N tokens this is the
Fisher diagonal divided by N. The form ``q = sum max(v^, g^2) delta^2`` uses the coordinates in which Adam runs. Its
scale comes from the coupling, which is measured on the model. This metric bounds layers whose forward pass the hooks do
not see (fused LoRA kernels), adapters of other kinds, and full fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ctr_optim.curvature.base import Stacked
from ctr_optim.curvature.defaults import CurvatureBase
from ctr_optim.runtime import distributed


class Gradient(CurvatureBase):
    """The metric ``sum max(v^, g^2) delta^2`` for every parameter. It needs no hooks on layers."""

    def quadratic(self, deltas: Mapping[Any, Tensor], done: Iterable[Any]) -> list[Tensor]:
        """Return one term ``()`` of the form for each stack."""
        return terms(deltas)


def terms(deltas: Mapping[Any, Tensor]) -> list[Tensor]:
    """Return one term ``()`` of the form ``sum max(v^, g^2) delta^2`` for each stack.

    Args:
        deltas: the step, ``(L, *shape)`` for each stack.
    """
    return [over_parts(stack, diagonal_form(stack, delta).sum()) for stack, delta in deltas.items()]


def diagonal_form(stack: Stacked, delta: Tensor) -> Tensor:
    """Return ``(L,)`` the form ``sum max(v^, g^2) delta^2`` of each parameter's step, in Adam's coordinates.

    v^ is the bias-corrected second moment and g is this step's gradient. The maximum matters when all earlier gradients
    were zero: v^ is then about g^2 divided by the number of steps, and would understate the length of the step.

    Args:
        stack: L parameters. A parameter that never had a gradient adds 0.
        delta: the step, ``(L, *shape)``.
    """
    second, beta2 = stack.tensors["exp_avg_sq"], float(stack.group["betas"][1])
    count = stack.tensors["step"].clamp_min(1).view(-1, *[1] * (second.dim() - 1))
    metric = second / (1 - beta2**count).to(second.dtype)
    newest = stack.newest()
    if newest is not None:
        metric = torch.maximum(metric, newest.square_())
    moved = stack.coordinates(delta).to(second.dtype)
    form: Tensor = torch.linalg.vecdot(metric.reshape(len(metric), -1), moved.reshape(len(metric), -1).square())
    return form


def over_parts(stack: Stacked, value: Tensor) -> Tensor:
    """Return the sum of ``value ()`` over all shards of sharded parameters; ``value`` itself if they are whole.

    Each process holds LoRA state whole, so that a stack with a ``rank_dim`` needs no sum.
    """
    return value if stack.rank_dim is not None else distributed.sum_over_parts(value, stack.params[0])
