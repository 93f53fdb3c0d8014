"""Structured estimates of a second moment ``E[v v^T]`` of width d.

K-FAC (Martens & Grosse, 2015, arXiv 1503.05671) approximates a layer's Fisher matrix by ``C (x) S``. C is the second
moment of the layer's inputs, and S is that of the gradients at its outputs. Three structures store these wide matrices:

=============  ==========================  =========================================
``Diagonal``   d numbers                   the default, sufficient with a measured coupling
``LowRank``    d (k + 1) numbers           Nystrom sketch of k columns, plus the diagonal
``Dense``      d^2 numbers                 small layers, and the reference of the tests
=============  ==========================  =========================================

Every structure is linear in ``v v^T``. Therefore sums over tokens and processes, and moving averages, act on its
tensors directly. All tensors may have leading batch dimensions, one entry per layer.
"""

from __future__ import annotations

from ctr_optim.curvature.factors.base import Factor
from ctr_optim.curvature.factors.dense import Dense
from ctr_optim.curvature.factors.diagonal import Diagonal
from ctr_optim.curvature.factors.lowrank import LowRank

STRUCTURES: dict[str, type[Factor]] = {"diagonal": Diagonal, "lowrank": LowRank, "dense": Dense}


__all__ = ["STRUCTURES", "Dense", "Diagonal", "Factor", "LowRank"]
