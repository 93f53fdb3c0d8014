"""Structured estimates of a second moment E[v v^T] of width d.

K-FAC (Martens & Grosse, 2015, arXiv 1503.05671) writes a layer's Fisher matrix as ``C (x) S``, with C the second
moment of its inputs and S that of the gradients at its outputs. Both are wide; three structures hold them:

=============  ==========================  =========================================
``Diagonal``   d numbers                   the default: calibrated, the metric needs no more
``LowRank``    d (k + 1) numbers           Nystrom sketch of k columns, plus the diagonal that it misses
``Dense``      d^2 numbers                 small layers, and the oracle of the tests
=============  ==========================  =========================================

Every structure is *linear* in v v^T: sums over tokens, layers and processes, and moving averages, act on its
tensors directly. All tensors carry any number of leading batch dimensions (one layer each).
"""

from __future__ import annotations

from ctr_optim.curvature.factors.base import Factor
from ctr_optim.curvature.factors.dense import Dense
from ctr_optim.curvature.factors.diagonal import Diagonal
from ctr_optim.curvature.factors.lowrank import LowRank

STRUCTURES: dict[str, type[Factor]] = {"diagonal": Diagonal, "lowrank": LowRank, "dense": Dense}


__all__ = ["STRUCTURES", "Dense", "Diagonal", "Factor", "LowRank"]
