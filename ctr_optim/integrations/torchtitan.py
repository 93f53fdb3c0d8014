"""Optimizers container for torchtitan that accepts the optimizer name ``CTR``. In the config of a model with LoRA::

optimizer=CTROptimizersContainer.Config(
    param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="CTR", optimizer_kwargs={"max_kl": 0.1})])
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer

from ctr_optim.optimizer import CTROptimizer
from ctr_optim.runtime import distributed

_OF_GROUPS = ("lr", "betas", "eps", "weight_decay", "maximize", "foreach")


class CTROptimizersContainer(OptimizersContainer):  # type: ignore[misc]
    """torchtitan's container with one CTROptimizer, whose trust region covers the whole model.

    Args:
        config: torchtitan's config of the container, with parameter groups that all name ``CTR``.
        model_parts: a list of one model.

    Raises:
        ValueError: a group names another optimizer, groups differ in an option that belongs to the whole optimizer, or
            there are several model parts (pipeline parallelism).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """torchtitan's options. ``build`` creates the class that defines its own Config, so this class defines one."""

    def __init__(self, config: Any, *, model_parts: list[nn.Module]) -> None:
        names = {group.optimizer_name for group in config.param_groups}
        if names != {"CTR"}:
            raise ValueError(
                f"param_groups: got optimizers {sorted(names)}, expected 'CTR' in every group, because one trust "
                "region bounds the whole step"
            )
        if len(model_parts) > 1:
            raise ValueError(
                f"CTROptimizersContainer: got {len(model_parts)} model parts (pipeline parallelism), expected one, "
                "because the trust region bounds the whole step; train without pipeline parallelism"
            )
        super().__init__(config, model_parts=model_parts)

    @staticmethod
    def _build_impl_kwargs(config: Any) -> dict[str, Any]:
        """Return no options: torchtitan's ``fused`` and ``foreach`` apply only to torch's own optimizers."""
        return {}

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., CTROptimizer]:
        """Return a function that builds a CTROptimizer from torchtitan's groups.

        torchtitan writes all options into every group. The function moves options of the whole optimizer out of the
        groups.
        """

        def build(groups: list[dict[str, Any]], **kwargs: Any) -> CTROptimizer:
            kept = ("params", "param_names", *_OF_GROUPS)
            shared = [{key: value for key, value in group.items() if key not in kept} for group in groups]
            if any(options != shared[0] for options in shared):
                raise ValueError(
                    f"param_groups: got the options {shared}, expected the same in every group; only lr, betas, eps, "
                    "weight_decay, maximize and foreach may differ"
                )
            return CTROptimizer([{k: v for k, v in g.items() if k in kept} for g in groups], **shared[0], **kwargs)

        return build

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state as one bytes object, because torchtitan's layout supports only Adam's tensors.

        Raises:
            NotImplementedError: the parameters are sharded (FSDP2), so each process has only a part of the state.
        """
        [optimizer] = self.optimizers
        if any(distributed.is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
            raise NotImplementedError(
                "CTROptimizersContainer: torchtitan's checkpoints cannot hold the state of sharded parameters (FSDP2). "
                "Set checkpoint.exclude_from_loading for 'optimizer' and save only the adapter, or train without FSDP2"
            )
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        return {"ctr_optim": file.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict`."""
        [optimizer] = self.optimizers
        optimizer.load_state_dict(torch.load(io.BytesIO(state_dict["ctr_optim"]), weights_only=True))
