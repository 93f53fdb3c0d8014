"""Hold-out: adapt the bound by the loss on rows that training never uses."""

from __future__ import annotations

from ctr_optim.holdout.judge import Judge
from ctr_optim.holdout.rows import Holdout

__all__ = ["Holdout", "Judge"]
