"""Model builder for torchtune that loads adapters of any rank, for resuming after ranks have moved.

The optimizer itself needs only YAML: ``_component_: ctr_optim.CTROptimizer``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from ctr_optim.integrations import accept_ranks


def lora_model(builder: str, **options: Any) -> nn.Module:
    """Return the model of a torchtune LoRA builder, with hooks that let it load adapters of any rank.

    torchtune's recipes build the model with one rank for all layers, and load the adapter before they build the
    optimizer. In a config::

        model:
          _component_: ctr_optim.integrations.torchtune.lora_model
          builder: torchtune.models.llama3_2.lora_llama3_2_1b
          lora_attn_modules: [q_proj, v_proj]
          lora_rank: 8
          lora_alpha: 16

    Args:
        builder: dotted name of the builder function.
        options: arguments of the builder.

    Raises:
        ValueError: there is no function of this name.
    """
    module, _, name = builder.rpartition(".")
    try:
        build = getattr(import_module(module), name)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(
            f"builder: got {builder!r}, expected the dotted name of a torchtune builder, such as "
            "torchtune.models.llama3_2.lora_llama3_2_1b"
        ) from error
    model: nn.Module = build(**options)
    accept_ranks(model)
    return model
