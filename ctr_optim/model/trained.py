"""The trained part of the user's model: the models that own the optimizer's parameters, and their LoRA layers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

from torch import nn

from ctr_optim.model import checks
from ctr_optim.model.discovery import find_roots
from ctr_optim.model.pair import LoRAPair
from ctr_optim.model.registry import find_pairs
from ctr_optim.runtime import distributed
from ctr_optim.runtime.messages import users_line


class Trained:
    """Models and LoRA layers that own the optimizer's parameters.

    Args:
        parameters: the optimizer's parameters.
        model: the model to search; None to search all live modules.
        rerunning: name of a curvature that runs its own backward passes; None for other curvatures.

    Attributes:
        pairs: LoRA layers whose B is among the parameters.
        fsdp: modules that FSDP2 wraps.

        Raises:
            ValueError: if a check in :mod:`ctr_optim.model.checks` refuses these parameters or models.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], model: nn.Module | None, rerunning: str | None) -> None:
        roots = [model] if model is not None else find_roots(parameters)
        checks.check_parameters(parameters)
        checks.check_sharding(parameters, rerunning)
        checks.check_models(roots)
        self._parameters = list(parameters)
        ours = {id(p) for p in parameters}
        found = {id(pair.B): pair for root in roots for pair in find_pairs(root, parameters)}
        self.pairs: list[LoRAPair] = [pair for pair in found.values() if id(pair.B) in ours]
        if not self.pairs and not any(p.requires_grad for p in parameters):
            warnings.warn(
                "CTROptimizer: none of its parameters requires a gradient, so nothing will train. Add the adapter to "
                "the model before you build the optimizer.",
                stacklevel=users_line(),
            )
        checks.warn_if_frozen(self.pairs)
        self._roots = [weakref.ref(root) for root in roots]  # weak: the optimizer must not keep the model alive
        self.fsdp = distributed.fsdp_modules(roots)

    @property
    def roots(self) -> list[nn.Module]:
        """The live models that hold the parameters."""
        return [root for ref in self._roots if (root := ref()) is not None]

    def home(self) -> nn.Module | None:
        """Return the model that holds all trained parameters; None if no single model does."""
        owners = {id(module) for module in self.owners()}
        return next((root for root in self.roots if owners and owners <= {id(m) for m in root.modules()}), None)

    def owners(self) -> list[nn.Module]:
        """Return the LoRA layers, followed by the modules that hold the other trained parameters."""
        paired = {id(p) for pair in self.pairs for p in (pair.A, pair.B)}
        others = {id(p) for p in self._parameters if p.requires_grad and id(p) not in paired}
        modules = {id(m): m for root in self.roots for m in root.modules()}
        found = [m for m in modules.values() if any(id(p) in others for p in m._parameters.values())]
        return [pair.layer for pair in self.pairs] + found
