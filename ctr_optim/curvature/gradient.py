"""A metric from gradients alone, for parameters without Kronecker factors.

Adam's second moments estimate the diagonal of ``E[g^2]`` over batches; for batch gradients of N tokens that is the
Fisher diagonal over N. ``q = sum v^ delta^2`` in the coordinates in which Adam runs has the right shape, and the
coupling, measured on the model, restores its scale. Layers whose forward pass the hooks do not see (fused LoRA
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
    """``(L,)`` the form ``sum v^ delta^2`` of each parameter's step, v^ bias-corrected, in Adam's coordinates.

    Args:
        stack: L parameters; a parameter that had no gradient yet contributes 0.
        delta: ``(L, *shape)``.
    """
    second, beta2 = stack.tensors["exp_avg_sq"], float(stack.group["betas"][1])
    moved = stack.coordinates(delta).to(second.dtype)
    form: Tensor = torch.linalg.vecdot(second.reshape(len(second), -1), moved.reshape(len(second), -1).square())
    return form / (1 - beta2 ** stack.tensors["step"].clamp_min(1))


def over_parts(stack: Stacked, value: Tensor) -> Tensor:
    """A sum over all processes' parts of sharded parameters; the value itself where each process holds them whole."""
    return value if stack.rank_dim is not None else distributed.sum_over_parts(value, stack.params[0])
