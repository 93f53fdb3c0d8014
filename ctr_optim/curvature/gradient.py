"""A metric from gradients alone, for parameters without Kronecker factors.

Adam's second moments estimate the diagonal of ``E[g^2]`` over batches; for batch gradients of N tokens that is the
Fisher diagonal over N. ``q = sum max(v^, g^2) delta^2`` in the coordinates in which Adam runs has the right shape, and
the coupling, measured on the model, restores its scale. Layers whose forward pass the hooks do not see (fused LoRA
kernels), adapters of other kinds and whole models are bounded this way.
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
    """The metric ``sum v^ delta^2`` for every parameter; needs no hooks on layers."""

    def quadratic(self, deltas: Mapping[Any, Tensor], done: Iterable[Any]) -> list[Tensor]:
        """Terms of the form, one a stack."""
        return terms(deltas)


def terms(deltas: Mapping[Any, Tensor]) -> list[Tensor]:
    """Terms of the form ``sum v^ delta^2``, one a stack."""
    return [over_parts(stack, diagonal_form(stack, delta).sum()) for stack, delta in deltas.items()]


def diagonal_form(stack: Stacked, delta: Tensor) -> Tensor:
    """``(L,)`` the form ``sum max(v^, g^2) delta^2`` of each parameter's step, in Adam's coordinates.

    v^ is bias-corrected, g this step's gradient: where all gradients before were zero, v^ is g^2 over the number of
    steps, and would take the first step that counts for far too short.

    Args:
        stack: L parameters; a parameter that had no gradient yet contributes 0.
        delta: ``(L, *shape)``.
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
    """A sum over all processes' parts of sharded parameters; the value itself where each process holds them whole."""
    return value if stack.rank_dim is not None else distributed.sum_over_parts(value, stack.params[0])
