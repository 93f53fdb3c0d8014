"""RankEvent: a change of one layer's rank or directions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RankEvent:
    """A change of one layer's rank or directions.

    Attributes:
        step: optimizer steps taken before the event.
        name: name of the layer.
        old_rank, new_rank: rank before and after the event.
        kept: number of directions that were kept. The other ``new_rank - kept`` directions are new.
        utility: utility of the layer's last chosen direction, in nats per token and million parameters.
        reason: ``"grow"``, ``"shrink"`` or ``"turn"`` (same rank, some directions replaced).
    """

    step: int
    name: str
    old_rank: int
    new_rank: int
    kept: int
    utility: float
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of plain values, for logs."""
        return asdict(self)
