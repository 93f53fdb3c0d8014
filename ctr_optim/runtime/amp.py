"""The loss scale of torch's GradScaler."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def grad_scale(like: Tensor) -> float | Tensor:
    """Return the loss scale of the GradScaler that called the running ``step()``, or 1.

    The GradScaler unscales ``p.grad``, but not the statistics that the hooks collected. It also hides its scale from
    optimizers if the user has called ``unscale_()`` for clipping. This function therefore searches the call stack of
    ``step()`` for the GradScaler.

    Args:
        like: tensor whose dtype and device the scale gets.

    Returns:
        a ``()`` tensor, or the number 1.0 without a GradScaler: to convert a number, the host would wait.
    """
    frame = sys._getframe(2)
    for _ in range(30):
        # Reading f_locals of the user's frames would keep their variables alive, so read only GradScaler's frames.
        scaler = frame.f_locals.get("self") if frame.f_globals.get("__name__") == "torch.amp.grad_scaler" else None
        if isinstance(scaler, torch.amp.GradScaler):
            scale = getattr(scaler, "_scale", None)  # None before the first use; a disabled scaler has none
            return 1.0 if scale is None else scale.to(like)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return 1.0
