"""Checkpoints that belong to the model, loaded exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.curvature.factors import STRUCTURES


def check_checkpoint(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], structure: str
) -> dict[nn.Parameter, dict[str, Any]]:
    """The saved entry of each parameter.

    Raises:
        ValueError: if groups, shapes or the structure of the factors differ; to be called before anything is loaded.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"checkpoint: no {key!r} in it; expected what CTROptimizer.state_dict() returns")
    saved_groups = state_dict["param_groups"]
    sizes, ours = [len(g["params"]) for g in saved_groups], [len(g["params"]) for g in groups]
    if sizes != ours:
        raise ValueError(f"checkpoint: got parameter groups of {sizes} parameters, expected {ours}")
    if "ctr" not in saved_groups[0]:
        raise ValueError("checkpoint: another optimizer wrote it; expected what CTROptimizer.state_dict() returns")
    saved = {}
    for mine, theirs in zip(groups, saved_groups, strict=True):
        for p, key in zip(mine["params"], theirs["params"], strict=True):
            entry = state_dict["state"].get(key)
            if entry is None:
                continue
            for name in ("exp_avg", "exp_avg_sq"):
                got = tuple(entry[name].shape) if name in entry else None
                if got != tuple(p.shape):
                    raise ValueError(
                        f"checkpoint: {name} of parameter {key} has shape {got}, the parameter {tuple(p.shape)}; load "
                        "the model's weights first (ranks may have changed), and check that it is the same model"
                    )
            if "factor_updates" in entry and any(f"input_{f}" not in entry for f in STRUCTURES[structure].fields):
                raise ValueError(
                    f"checkpoint: its factors are not {structure!r}; build the optimizer with the factor_structure "
                    "that wrote it"
                )
            saved[p] = entry
    return saved


def exact_copy(entry: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A state entry on ``device``, every tensor in its own dtype."""
    return {k: v.detach().to(device, copy=True) if isinstance(v, Tensor) else v for k, v in entry.items()}
