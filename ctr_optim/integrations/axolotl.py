"""Plugin for axolotl. Add to the YAML config::

    plugins: [ctr_optim.integrations.axolotl.CTRPlugin]
    ctr: {max_kl: 0.1}

The plugin replaces ``optimizer`` and ``learning_rate``. Warm-up and learning rate schedule still apply.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ctr_optim.integrations.transformers import attach


class CTRArgs(BaseModel):
    """Options that the plugin adds to axolotl's config.

    Attributes:
        ctr: arguments of CTROptimizer; None for the defaults.
    """

    ctr: dict[str, Any] | None = None


class CTRPlugin(BasePlugin):  # type: ignore[misc]
    """axolotl plugin that trains with a CTROptimizer. axolotl calls ``post_trainer_create`` before training."""

    def get_input_args(self) -> str:
        """Return the dotted name of :class:`CTRArgs`."""
        return f"{CTRArgs.__module__}.{CTRArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach the optimizer to the trainer. The config's ``optimizer:`` is ignored."""
        attach(trainer, **(cfg.get("ctr") or {}))
