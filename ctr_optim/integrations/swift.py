"""Plugin for ms-swift. Write a file ``ctr_plugin.py``::

    from ctr_optim.integrations.swift import register
    register(max_kl=0.1)

and run ``swift sft --external_plugins ctr_plugin.py --optimizer ctr ...``.
"""

from __future__ import annotations

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map

from ctr_optim.integrations.transformers import CTRCallback, CTRFactory
from ctr_optim.optimizer import CTROptimizer


def register(**options: Any) -> None:
    """Add the optimizer ``ctr`` to ms-swift's registry; ``options`` are arguments of CTROptimizer."""

    class CTROptimizerCallback(OptimizerCallback):  # type: ignore[misc]
        """Build the optimizer when the trainer requests it."""

        def create_optimizer(self, model: Any = None) -> CTROptimizer:
            trainer = self.trainer
            if not any(isinstance(callback, CTRCallback) for callback in trainer.callback_handler.callbacks):
                trainer.add_callback(CTRCallback())
            return CTRFactory()(trainer.model if model is None else model, **options)

    optimizers_map["ctr"] = CTROptimizerCallback
