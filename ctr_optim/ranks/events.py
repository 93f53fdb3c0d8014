"""RankEvent: one layer's rank changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RankEvent:
    """One layer's rank changed.

    Attributes:
        step: optimizer steps taken when it happened.
        name: the layer.
        old_rank, new_rank: ranks.
        kept: directions carried over; ``new_rank - kept`` are new ones.
        utility: of the layer's last direction chosen, nats per token and million parameters.
        reason: ``"grow"``, ``"shrink"`` or ``"turn"`` (same rank, some directions exchanged).
    """

    step: int
    name: str
    old_rank: int
    new_rank: int
    kept: int
    utility: float
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for logs."""
        return asdict(self)
