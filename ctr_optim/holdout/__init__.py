"""Rows that are never trained on judge the bound: :class:`Holdout`."""

from __future__ import annotations

from ctr_optim.holdout.judge import Judge
from ctr_optim.holdout.rows import Holdout

__all__ = ["Holdout", "Judge"]
