"""torchtitan: an optimizers container that accepts the name ``CTR``. In the config of a model with LoRA::

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
    """One CTROptimizer for each model part; its trust region covers the whole part.

    Raises:
        ValueError: groups of another optimizer, since a bound on half of a step is none; or groups whose options
            differ in what is not a group's.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """torchtitan's own; ``build`` makes the class that defines its Config, and would make the parent without."""

    def __init__(self, config: Any, *, model_parts: list[nn.Module]) -> None:
        names = {group.optimizer_name for group in config.param_groups}
        if names != {"CTR"}:
            raise ValueError(f"param_groups: got optimizers {sorted(names)}, expected 'CTR' for all: one trust region")
        if len(model_parts) > 1:
            raise ValueError(
                f"CTROptimizersContainer: got {len(model_parts)} model parts (pipeline parallelism), expected one; the "
                "trust region needs the whole step"
            )
        super().__init__(config, model_parts=model_parts)

    @staticmethod
    def _build_impl_kwargs(config: Any) -> dict[str, Any]:
        """None: ``fused`` and ``foreach`` choose among torch's own implementations."""
        return {}

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., CTROptimizer]:
        """Takes the options that are not a group's out of the groups, which torchtitan fills with all of them."""

        def build(groups: list[dict[str, Any]], **kwargs: Any) -> CTROptimizer:
            kept = ("params", "param_names", *_OF_GROUPS)
            shared = [{key: value for key, value in group.items() if key not in kept} for group in groups]
            if any(options != shared[0] for options in shared):
                raise ValueError(f"param_groups: got the options {shared}, expected the same in every group")
            return CTROptimizer([{k: v for k, v in g.items() if k in kept} for g in groups], **shared[0], **kwargs)

        return build

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state as one object of bytes: torchtitan's own layout knows Adam's tensors alone.

        Raises:
            NotImplementedError: the parameters are sharded (FSDP2), so that each process holds a part.
        """
        [optimizer] = self.optimizers
        if any(distributed.is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
            raise NotImplementedError(
                "CTROptimizersContainer: the state of sharded parameters does not fit torchtitan's checkpoints; set "
                "checkpoint.exclude_from_loading for 'optimizer' and save the adapter alone, or train replicated"
            )
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        return {"ctr_optim": file.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave."""
        [optimizer] = self.optimizers
        optimizer.load_state_dict(torch.load(io.BytesIO(state_dict["ctr_optim"]), weights_only=True))
