"""RefLoRA (arXiv 2505.18877) as a baseline, our reading: AdamW on gradients of the best factorisation of B A.

Every invertible P gives the same product ``B A = (B P^-T) (P^T A)``, but another gradient step. A step of length eta on
the new pair moves the old pair by ``-eta S^-1 grad_A`` and ``-eta grad_B S`` with ``S = P P^T``. RefLoRA takes the S
that minimizes an upper bound on the loss after the step. In closed form it is a geometric mean of two r x r matrices
(see :func:`refactoring`), and the new pair is balanced: ``A~ A~^T = B~^T B~``.

From the authors' public program: the closed form, its place (on the gradients, before every step of AdamW) and a
warm-up of plain LoRA, because S is 0 while B is 0. Own choices: eigenvalues below ``FLOOR`` times the largest are
raised to that value, and the warm-up is a tenth of the run, at most the program's 100 steps.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.layers import lora_layers

FLOOR = 1e-10  # smallest eigenvalue of a matrix, relative to its largest
WARM_UP = 100  # largest number of steps of plain LoRA at the start


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues ``(..., r)``, raised to the floor, and eigenvectors ``(..., r, r)`` of a PSD matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = FLOOR * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
    return values.maximum(floor), vectors


def _power(values: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    return (vectors * values[..., None, :] ** exponent) @ vectors.mT


def refactoring(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the optimal S ``(..., r, r)`` and its inverse.

    S is the geometric mean of ``X^-1`` and ``Y``: ``S = X^-1/2 (X^1/2 Y X^1/2)^1/2 X^-1/2``. It solves ``S X S = Y``.
    It minimizes two sums of squared Frobenius norms: ``||A~||^2 + ||B~||^2 = tr(S X) + tr(S^-1 Y)``, and
    ``||A~^T A~||^2 + ||B~ B~^T||^2 = tr((S X)^2) + tr((S^-1 Y)^2)``, a bound on the change of the product in a step.

    Args:
        x: ``A A^T (..., r, r)``.
        y: ``B^T B (..., r, r)``.
    """
    values, vectors = _eigen(x)
    root, inverse_root = _power(values, vectors, 0.5), _power(values, vectors, -0.5)
    inner = _eigen(root @ y @ root)
    s = inverse_root @ _power(*inner, 0.5) @ inverse_root
    return s, root @ _power(*inner, -0.5) @ root


class Refactorer:
    """Replaces the gradients of A and B by ``S^-1 grad_A`` and ``grad_B S`` before every step of an optimizer.

    The gradients of layers whose B is 0 stay as they are.

    Args:
        model: a PEFT model with LoRA layers.
        optimizer: the optimizer of its adapter.
        warm_up: number of first steps with unchanged gradients.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, warm_up: int) -> None:
        self.warm_up, self.steps = warm_up, 0
        self.groups: dict[int, list[tuple[nn.Parameter, nn.Parameter]]] = defaultdict(list)  # by rank
        for a, b in lora_layers(model):
            self.groups[a.weight.shape[0]].append((a.weight, b.weight))
        optimizer.register_step_pre_hook(self._before)

    @torch.no_grad()
    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.steps += 1
        if self.steps <= self.warm_up:
            return
        for pairs in self.groups.values():
            found = [(a, b) for a, b in pairs if a.grad is not None and b.grad is not None]
            if not found:
                continue
            # Float64, because a Gram matrix squares the condition number.
            x = torch.stack([a.double() @ a.double().mT for a, _ in found])
            y = torch.stack([b.double().mT @ b.double() for _, b in found])
            s, inverse = refactoring(x, y)
            known = (y.diagonal(dim1=-2, dim2=-1).sum(-1) > 0)[:, None, None]
            eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            s, inverse = torch.where(known, s, eye), torch.where(known, inverse, eye)
            for (a, b), forward, backward in zip(found, s, inverse, strict=True):
                a.grad.copy_(backward.to(a.grad) @ a.grad)
                b.grad.copy_(b.grad @ forward.to(b.grad))
