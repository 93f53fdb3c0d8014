"""A single-pass randomized sketch of whitened gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ctr_optim.curvature.factors import Factor


@dataclass
class Sketch:
    """A single-pass randomized sketch of the whitened gradients ``G~ = W_S G W_C^T`` with ``G = sum_t g_t x_t^T``.

    ``G~ Omega`` and ``Psi^T G~`` determine the leading singular triples of G~ (Tropp et al., 2017, arXiv 1609.00048).
    The cost is that of a LoRA of rank k, because no gradient of W0 is formed. Whitening never touches the tokens:
    it applies to the test matrices on one side, and to the sums on the other (:meth:`whitened`).

    Attributes:
        range_: ``G W_C^T Omega (L, d_out, k)``.
        corange: ``Psi^T W_S G (L, l, d_in)``.
        omega, psi: Gaussian test matrices ``(d_in, k)`` and ``(d_out, l)``.
        structure: structure of C and S.
    """

    range_: Tensor
    corange: Tensor
    omega: Tensor
    psi: Tensor
    structure: type[Factor]

    def aim(self, input_whitener: Any, output_whitener: Any) -> None:
        """Set the whiteners of C and S for all tokens that are added from now on."""
        self._whiteners = input_whitener, output_whitener
        self._right = self.structure.whiten(input_whitener, self.omega, transpose=True)
        self._left = self.structure.whiten(output_whitener, self.psi, transpose=True)

    def add_(self, layers: Tensor, x: Tensor, g: Tensor, stride: int) -> None:
        """Add tokens of m layers, in place.

        Args:
            layers: ``(m,)`` indices of the layers.
            x, g: inputs ``(m, n, d_in)`` and gradients ``(m, n, d_out)``.
            stride: number of tokens that each of the n tokens represents.
        """
        self.range_.index_add_(0, layers, g.mT @ (x @ self._right[layers]), alpha=stride)
        self.corange.index_add_(0, layers, (g @ self._left[layers]).mT @ x, alpha=stride)

    def whitened(self) -> tuple[Tensor, Tensor]:
        """Return ``G~ Omega (L, d_out, k)`` and ``Psi^T G~ (L, l, d_in)``."""
        w_in, w_out = self._whiteners
        return self.structure.whiten(w_out, self.range_), self.structure.whiten(w_in, self.corange.mT).mT
