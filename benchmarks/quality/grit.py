"""GRIT (arXiv 2601.00231) as a baseline, our reading: K-FAC in the rank space of LoRA, reprojection, effective ranks.

With ``h = A x`` and ``e = B^T g`` per token (g: gradient at the layer's output), GRIT keeps running means of two r x r
matrices, ``Sigma_a`` of ``h h^T`` and ``Sigma_g`` of ``e e^T``. Every ``STATISTICS``-th step adds its tokens. GRIT has
three parts:

1. Before AdamW's step: ``grad_A <- Sigma_a^-1 grad_A`` and ``grad_B <- grad_B Sigma_g^-1``.
2. Every ``INTERVAL`` steps: ``A <- U U^T A`` and ``B <- B V V^T``. U and V hold the k leading eigenvectors of Sigma_a
   and of Sigma_g.
3. k, the layer's effective rank, is the smallest number of eigenvalues of Sigma_a with a share ``ENERGY`` of their sum,
   at least ``MIN_RANK``. A and B keep their shapes.

The formulas, intervals and constants are those of the authors' public program and its README. A Kronecker-factored
Fisher matrix would pair A with Sigma_g and B with Sigma_a instead; ``sides="kfac"`` does that. Own choices: damping
relative to the mean eigenvalue (the program adds 1e-3, far above Sigma_g, so that Adam cancels that inverse), fixed
intervals and damping (the program adapts them to the loss), no reprojection after the last step, and none of the two
optional penalties (weights of 1e-5 and 1e-4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.layers import lora_layers

STATISTICS = 15  # steps between two updates of the statistics
INTERVAL = 50  # steps between two inversions and between two reprojections
DAMPING = 1e-3  # relative to the mean eigenvalue
ENERGY = 0.99
MIN_RANK = 4
SIDES = ("published", "kfac")


def inverse(sigma: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the inverse of ``sigma + damping mean(eigenvalues) I``, ``(r, r)``; the identity if sigma is zero."""
    mean = sigma.diagonal().mean()
    eye = torch.eye(len(sigma), dtype=sigma.dtype, device=sigma.device)
    return torch.linalg.inv(torch.where(mean > 0, sigma + damping * mean * eye, eye))


def effective_rank(sigma: Tensor, energy: float = ENERGY, least: int = MIN_RANK) -> int:
    """Return the smallest number of eigenvalues of ``sigma (r, r)`` with a share ``energy`` of their sum.

    The result is at least ``least`` and at most r.
    """
    values = torch.linalg.eigvalsh(sigma).clamp_min(0).flip(0)
    count = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    return min(max(count, least), len(sigma))


def projector(sigma: Tensor, rank: int) -> Tensor:
    """Return the orthogonal projector ``(r, r)`` on the ``rank`` leading eigenvectors of ``sigma (r, r)``."""
    leading = torch.linalg.eigh(sigma).eigenvectors[:, -rank:]
    return leading @ leading.mT


@dataclass
class Layer:
    """A and B of a layer with their statistics: ``sigma_a`` and ``sigma_g``, ``(r, r)``, float64."""

    a: nn.Parameter
    b: nn.Parameter
    sigma_a: Tensor
    sigma_g: Tensor
    tokens: int = 0
    inverses: tuple[Tensor, Tensor] | None = None

    def add(self, h: Tensor, e: Tensor) -> None:
        """Add the tokens ``h`` and ``e``, ``(..., r)``, to the running means."""
        h, e = h.detach().flatten(0, -2).double(), e.detach().flatten(0, -2).double()
        self.tokens += len(h)
        self.sigma_a += (h.mT @ h - len(h) * self.sigma_a) / self.tokens
        self.sigma_g += (e.mT @ e - len(e) * self.sigma_g) / self.tokens


class Grit:
    """The three parts of GRIT around an optimizer. Call :meth:`after_step` after every step.

    Args:
        model: a PEFT model with LoRA layers.
        optimizer: the optimizer of its adapter.
        steps: number of steps of the run.
        sides: ``"published"`` or ``"kfac"``.

    Raises:
        ValueError: unknown ``sides``.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, sides: str = "published"
    ) -> None:
        if sides not in SIDES:
            raise ValueError(f"sides: got {sides!r}, expected one of {SIDES}")
        self.total, self.sides, self.steps = steps, sides, 0
        self.layers: list[Layer] = []
        for down, up in lora_layers(model):
            zero = down.weight.new_zeros(down.weight.shape[0], down.weight.shape[0], dtype=torch.float64)
            layer = Layer(down.weight, up.weight, zero, zero.clone())
            down.register_forward_hook(self._capture(layer))
            self.layers.append(layer)
        optimizer.register_step_pre_hook(self._before)

    def _capture(self, layer: Layer) -> Any:
        def hook(module: nn.Module, inputs: Any, h: Tensor) -> None:
            if h.requires_grad and (self.steps + 1) % STATISTICS == 0:
                h.register_hook(lambda e: layer.add(h, e))

        return hook

    @torch.no_grad()
    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for layer in self.layers:
            if layer.inverses is not None and layer.a.grad is not None and layer.b.grad is not None:
                for_a, for_b = layer.inverses if self.sides == "published" else layer.inverses[::-1]
                layer.a.grad.copy_(for_a @ layer.a.grad)
                layer.b.grad.copy_(layer.b.grad @ for_b)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Count a step; at an interval's end, invert the statistics and reproject the weights."""
        self.steps += 1
        if self.steps % INTERVAL == 0 and self.steps < self.total:
            for layer in self.layers:
                if layer.tokens:
                    self._reproject(layer)
                    both = inverse(layer.sigma_a), inverse(layer.sigma_g)
                    layer.inverses = (both[0].to(layer.a), both[1].to(layer.b))

    def _reproject(self, layer: Layer) -> None:
        rank = effective_rank(layer.sigma_a)
        layer.a.copy_(projector(layer.sigma_a, rank).to(layer.a) @ layer.a)
        layer.b.copy_(layer.b @ projector(layer.sigma_g, rank).to(layer.b))

    def ranks(self) -> list[int]:
        """Return the effective rank of every layer that has statistics."""
        return [effective_rank(layer.sigma_a) for layer in self.layers if layer.tokens]
