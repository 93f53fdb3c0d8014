"""The second curvature proxy: the Hessian's diagonal, by Hutchinson's estimator.

``diag(H) = E[z * H z]`` for signs z (Hutchinson, 1990; AdaHessian, arXiv 2006.00719). The Hessian-vector product is a
central difference of gradients on a slice of the last batch, so that no double backward is needed and every attention
kernel will do. Dearer than K-FAC (two backwards at a time) and blind to how a layer's parameters move together: it is
here to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.direction.stack import Stack, initial_state
from ctr_optim.runtime import distributed
from ctr_optim.trust_region.rerun import moved

_RADIUS = 1e-3  # of the difference, per coordinate: above float32's rounding, below the curvature's own scale


def make_room(state: MutableMapping[Any, dict[str, Tensor]], params: Sequence[nn.Parameter]) -> None:
    """A place for the diagonal in the state of every parameter."""
    for p in params:
        if not state[p]:
            state[p].update(initial_state(p, None))
        state[p].setdefault("hessian_diagonal", torch.zeros_like(state[p]["exp_avg"]))


@torch.no_grad()
def sample_diagonal(
    stacks: Sequence[Stack], gradients: Callable[[list[Tensor]], list[Tensor]], seed: int
) -> list[Tensor]:
    """One sample ``z * H z`` for each stack, ``(L, *shape)``.

    Args:
        gradients: gradients of the loss for a list of parameters, where they stand.
        seed: of the signs; the same on every process.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = []
    for stack in stacks:
        shape = stack.tensors["exp_avg"].shape
        z = torch.randint(0, 2, shape, generator=generator, device="cpu").mul_(2).sub_(1)
        signs.append(z.to(stack.tensors["exp_avg"]))
    params: list[Tensor] = [p for stack in stacks for p in stack.params]
    changes = [(list(stack.params), list(z.unbind(0))) for stack, z in zip(stacks, signs, strict=True)]
    ends = []
    for radius in (_RADIUS, -_RADIUS):
        with moved(changes, radius):
            ends.append(gradients(params))
    products = iter([(plus - minus) / (2 * _RADIUS) for plus, minus in zip(*ends, strict=True)])
    return [
        z * torch.stack([next(products).to(z) for _ in stack.params]) for stack, z in zip(stacks, signs, strict=True)
    ]


def sample(
    stacks: Sequence[Stack], gradients: Callable[[list[Tensor]], list[Tensor]], shared: dict[str, Any], decay: float
) -> None:
    """Another sample into the moving average, the mean over processes."""
    samples = sample_diagonal(stacks, gradients, shared["steps"])
    world = distributed.add_up(samples)
    shared["hessians"] += 1
    for stack, one in zip(stacks, samples, strict=True):
        update_diagonal_(stack, one / world, decay, shared["hessians"])


def update_diagonal_(stack: Stack, sample: Tensor, decay: float, updates: int) -> None:
    """Bias-corrected moving average of the samples, in the stack's state; samples that are not finite are left out."""
    weight = (1 - decay) / (1 - decay**updates)
    diagonal = stack.tensors["hessian_diagonal"]
    diagonal.lerp_(torch.where(torch.isfinite(sample), sample, diagonal), weight)


def quadratic(stack: Stack, delta: Tensor) -> Tensor:
    """``()`` the form ``<delta, max(diag(H), 0) delta>`` of a stack's step."""
    return (delta.square() * stack.tensors["hessian_diagonal"].clamp_min(0)).sum()
