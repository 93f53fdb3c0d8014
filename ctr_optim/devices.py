"""A model may lie on several devices (``device_map``): what its parts have to say comes together on one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def together(scalars: Sequence[Tensor]) -> Tensor:
    """``(n,)`` on the first one's device; nothing waits."""
    home = scalars[0].device
    return torch.stack([s.to(home, non_blocking=True) for s in scalars])
