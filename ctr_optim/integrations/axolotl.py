"""axolotl: a plugin. In the YAML::

    plugins: [ctr_optim.integrations.axolotl.CTRPlugin]
    ctr: {max_kl: 0.1}

The plugin takes the place of ``optimizer`` and ``learning_rate``; warm-up and schedule apply.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ctr_optim.integrations.transformers import attach


class CTRArgs(BaseModel):
    """Options that the plugin adds to axolotl's config."""

    ctr: dict[str, Any] | None = None


class CTRPlugin(BasePlugin):  # type: ignore[misc]
    """Trains with a CTROptimizer. axolotl calls ``post_trainer_create`` before the training begins."""

    def get_input_args(self) -> str:
        """The dotted name of :class:`CTRArgs`."""
        return f"{CTRArgs.__module__}.{CTRArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach the optimizer, whatever ``optimizer:`` said."""
        attach(trainer, **(cfg.get("ctr") or {}))
