"""A single-pass randomized sketch of whitened gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ctr_optim.curvature.factors import Factor


@dataclass
class Sketch:
    """A single-pass randomized sketch of the whitened gradients ``G~ = W_S G W_C^T``, ``G = sum_t g_t x_t^T``.

    ``G~ Omega`` and ``Psi^T G~`` determine its leading singular triples (Tropp et al., 2017, arXiv 1609.00048) at the
    cost of a LoRA of rank k. No gradient of W0 is ever formed, and tokens are never whitened: the test matrices are, on
    one side, and the sums (:meth:`whitened`) on the other.

    Attributes:
        range_: ``G W_C^T Omega`` (L, d_out, k).
        corange: ``Psi^T W_S G`` (L, l, d_in).
    """

    range_: Tensor
    corange: Tensor
    omega: Tensor
    psi: Tensor
    structure: type[Factor]

    def aim(self, input_whitener: Any, output_whitener: Any) -> None:
        """Whiten what comes from now on so."""
        self._whiteners = input_whitener, output_whitener
        self._right = self.structure.whiten(input_whitener, self.omega, transpose=True)
        self._left = self.structure.whiten(output_whitener, self.psi, transpose=True)

    def add_(self, layers: Tensor, x: Tensor, g: Tensor, stride: int) -> None:
        """Add tokens of k layers, each of which stands for ``stride``: x ``(k, n, d_in)``, g ``(k, n, d_out)``."""
        self.range_.index_add_(0, layers, g.mT @ (x @ self._right[layers]), alpha=stride)
        self.corange.index_add_(0, layers, (g @ self._left[layers]).mT @ x, alpha=stride)

    def whitened(self) -> tuple[Tensor, Tensor]:
        """``G~ Omega`` and ``Psi^T G~``."""
        w_in, w_out = self._whiteners
        return self.structure.whiten(w_out, self.range_), self.structure.whiten(w_in, self.corange.mT).mT
