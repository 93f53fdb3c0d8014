"""torchtune: the optimizer is a line of YAML (``_component_: ctr_optim.CTROptimizer``); resuming needs a word more."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from ctr_optim.integrations import accept_ranks


def lora_model(builder: str, **options: Any) -> nn.Module:
    """The model of one of torchtune's LoRA builders, which loads adapters of any rank.

    torchtune's recipes build the model with one rank for all layers and load the adapter before the optimizer exists.
    In a config::

        model:
          _component_: ctr_optim.integrations.torchtune.lora_model
          builder: torchtune.models.llama3_2.lora_llama3_2_1b
          lora_attn_modules: [q_proj, v_proj]
          lora_rank: 8
          lora_alpha: 16

    Args:
        builder: the builder's dotted name.
        options: its arguments.

    Raises:
        ValueError: ``builder`` names no function.
    """
    module, _, name = builder.rpartition(".")
    try:
        build = getattr(import_module(module), name)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(
            f"builder: got {builder!r}, expected the dotted name of one of torchtune's builders"
        ) from error
    model: nn.Module = build(**options)
    accept_ranks(model)
    return model
