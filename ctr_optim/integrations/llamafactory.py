"""Integration with LLaMA-Factory, versions 0 and 1.

Version 1: ``import ctr_optim.integrations.llamafactory`` registers the optimizer ``ctr``. Select it in the config with
``optim_config: {name: ctr, max_kl: 0.1}``. Version 0 hard-codes its optimizers, and needs a launch script::

    from ctr_optim.integrations.llamafactory import install; install(max_kl=0.1)
    from llamafactory.train.tuner import run_exp; run_exp()
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from ctr_optim.integrations.transformers import CTRFactory
from ctr_optim.optimizer import CTROptimizer

_TRAINERS = ("sft", "dpo", "kto", "pt", "rm")  # without PPO, because TRL's old PPO trainer needs its own optimizer


def build(model: nn.Module, config: Mapping[str, Any]) -> CTROptimizer:
    """Build the optimizer of version 1's ``optim_config``. All entries except ``name`` are CTROptimizer arguments."""
    return CTRFactory()(model, **{name: value for name, value in dict(config).items() if name != "name"})


def install(**options: Any) -> list[str]:
    """Make the trainers of version 0 build a CTROptimizer instead of the config's ``optim``.

    Args:
        options: arguments of CTROptimizer.

    Returns:
        Names of the changed trainer modules.

    Raises:
        RuntimeError: no trainer module has the function to replace. Nothing is changed.
    """

    def create_custom_optimizer(model: nn.Module, *_: Any) -> CTROptimizer:
        return CTRFactory()(model, **options)

    found = []
    for name in _TRAINERS:
        module = f"llamafactory.train.{name}.trainer"
        if module in sys.modules or find_spec(f"llamafactory.train.{name}") is not None:
            trainer = import_module(module)
            if hasattr(trainer, "create_custom_optimizer"):
                trainer.create_custom_optimizer = create_custom_optimizer  # type: ignore[attr-defined]
                found.append(module)
    if not found:
        raise RuntimeError(
            "install: no create_custom_optimizer in llamafactory.train.*.trainer, expected LLaMA-Factory 0.9.5 or "
            "older; with version 1, use optim_config with name: ctr"
        )
    return found


def _register() -> None:
    """Register ``ctr`` with version 1, if it is installed."""
    try:
        plugins = import_module("llamafactory.v1.plugins.trainer_plugins.optimizer")
    except ImportError:
        return
    plugins.OptimizerPlugin("ctr").register()(build)


_register()
