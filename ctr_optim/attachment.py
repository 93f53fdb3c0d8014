"""The layers that an optimizer finds in the user's model, what it hangs on them, and how all of it comes off again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakMethod

import torch
from torch import nn

from ctr_optim import guards
from ctr_optim.adapters import find_pairs, find_roots
from ctr_optim.calibration import Probe
from ctr_optim.curvature.capture import Taps
from ctr_optim.hooks import Hook
from ctr_optim.lora import LoRAPair
from ctr_optim.settings import Settings


def layers_of(
    parameters: Sequence[nn.Parameter], model: nn.Module | None, settings: Settings
) -> tuple[list[nn.Module], list[LoRAPair]]:
    """The models that hold these parameters, or ``model``, and their LoRA layers of which these include B.

    Raises:
        ValueError, TypeError: for parameters and models that we cannot train.
    """
    roots = [model] if model is not None else find_roots(parameters)
    guards.check_parameters(parameters)
    guards.check_sharding(parameters, settings.curvature)
    guards.check_models(roots)
    ours = {id(p) for p in parameters}
    found = {id(pair.B): pair for root in roots for pair in find_pairs(root, parameters)}
    pairs = [pair for pair in found.values() if id(pair.B) in ours]
    if not pairs:
        warnings.warn(
            "CTROptimizer found no LoRA layers that own any of its parameters: it will train them as AdamW does. "
            "Build the optimizer after the adapters have been added to the model, and pass their parameters "
            "(or name the model: CTROptimizer(params, model=model)).",
            stacklevel=4,
        )
    return roots, pairs


class Attachment:
    """Taps on the layers, a probe on the model that owns them, and word of every forward that will be trained on.

    The model's hooks hold this object; it holds the optimizer weakly.
    """

    def __init__(
        self, roots: Sequence[nn.Module], pairs: Sequence[LoRAPair], settings: Settings, begins: WeakMethod[Any]
    ) -> None:
        self.taps = Taps(pairs if settings.curvature == "kfac" else [], settings.max_tokens)
        self.probe: Probe | None = None
        if pairs and settings.curvature != "none" and settings.calibration_interval is not None:
            layers = [pair.layer for pair in pairs]
            home = next((root for root in roots if {id(m) for m in layers} <= {id(m) for m in root.modules()}), None)
            self.probe = None if home is None else Probe(home, layers)
        begin = partial(_forward_begins, begins)
        hooked = roots if self.taps.stages else []
        self.handles: list[Any] = [root.register_forward_pre_hook(Hook(begin, id(root))) for root in hooked]

    def close(self) -> None:
        """Remove every hook."""
        self.taps.close()
        for handle in self.handles:
            handle.remove()
        if self.probe is not None:
            self.probe.close()


def _forward_begins(begins: WeakMethod[Any], *_: Any) -> None:
    """A GradScaler skips ``step()`` on an overflow, and ``model.zero_grad()`` tells the optimizer nothing: look.

    Hooked to the whole model: checkpointing runs parts of it again during backward.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if (look := begins()) is not None:
        look()
