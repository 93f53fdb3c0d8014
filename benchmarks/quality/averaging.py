"""Average of the trained weights over the last part of a run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class WeightAverage:
    """Running average ``mean <- mean + min(1, share / t) (p - mean)`` after step t = 1, 2, ...

    With ``share=1`` all steps count equally. With ``share=k`` the average reaches back over about the last k-th part of
    the steps: the weight of step i after t steps is about ``(k / t) (i / t)^(k - 1)``.

    Args:
        params: the trained parameters.
        share: k, at least 1.

    Raises:
        ValueError: ``share`` below 1.
    """

    def __init__(self, params: Iterable[nn.Parameter], share: float) -> None:
        if share < 1:
            raise ValueError(f"share: got {share}, expected at least 1")
        self.share, self.count = share, 0
        self.params = list(params)
        self.means = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights."""
        self.count += 1
        torch._foreach_lerp_(self.means, [p.detach() for p in self.params], min(1.0, self.share / self.count))

    @torch.no_grad()
    def put(self) -> None:
        """Set the weights to their average."""
        for p, mean in zip(self.params, self.means, strict=True):
            p.copy_(mean)
