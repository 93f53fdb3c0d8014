"""The loss scale of a GradScaler."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def grad_scale() -> float | Tensor:
    """The loss scale of the GradScaler that called the running ``step()``, or 1.

    The scaler unscales ``p.grad`` but cannot reach what the taps staged, and hides its scale from optimizers when the
    user unscaled early to clip. It is the caller of ``step()``, a few frames up.
    """
    frame = sys._getframe(2)
    for _ in range(30):
        # f_locals of the user's own frames would keep their variables alive: look into the scaler's alone
        scaler = frame.f_locals.get("self") if frame.f_globals.get("__name__") == "torch.amp.grad_scaler" else None
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler._scale if scaler._scale is not None else 1.0
        if frame.f_back is None:
            break
        frame = frame.f_back
    return 1.0
