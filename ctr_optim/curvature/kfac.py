"""K-FAC for LoRA layers: full H and D, structured C and S, measured by hooks during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.curvature.base import Curvature, Gradients, LossScale, Stacked, StackedPair, State
from ctr_optim.curvature.blocks import Block, TokenScale, factor_state, newest_weight, refresh_bases
from ctr_optim.curvature.capture import Taps
from ctr_optim.curvature.defaults import CurvatureBase
from ctr_optim.curvature.factors import STRUCTURES
from ctr_optim.curvature.gradient import Gradient, diagonal_form, over_parts
from ctr_optim.model import checks
from ctr_optim.model.pair import LoRAPair
from ctr_optim.runtime import distributed
from ctr_optim.runtime.amp import grad_scale
from ctr_optim.runtime.devices import together
from ctr_optim.settings import Settings, chosen, due


@dataclass(slots=True)
class TokenState:
    """Numbers that a checkpoint carries: ``tokens``, the loss tokens of the last observed step; 0 if unknown."""

    tokens: float = 0.0


class KFAC(CurvatureBase):
    """The K-FAC metric: Kronecker factors for every LoRA layer, Adam's second moments for all other parameters.

    Args:
        pairs: the LoRA layers; every B must be trained.
        settings: options of the optimizer.

    Attributes:
        taps: hooks on the layers.
        blocks: one block with factors per layer shape; empty until stacks are bound.
        sketching: whether whitened gradients are sketched for a rank event.
    """

    per_token = True

    def __init__(self, pairs: Sequence[LoRAPair], settings: Settings) -> None:
        self.pairs, self.settings = list(pairs), settings
        self.structure = chosen("factor_structure", settings.factor_structure, STRUCTURES)
        self.taps = Taps(pairs, settings.max_tokens)
        self.blocks: list[Block] = []
        self.sketching = False
        self._looked = False
        self._others: list[Stacked] = []
        self._complete: bool | None = None
        self._count: Tensor | None = None  # loss tokens; infinite until the hooks see tokens of some layer
        self.state = TokenState()

    @classmethod
    def build(cls, pairs: Sequence[LoRAPair], settings: Settings, prober: Gradients | None) -> Curvature:
        """Return the curvature of an optimizer: K-FAC, or the metric from gradients if there are no LoRA layers."""
        return cls(pairs, settings) if pairs else Gradient()

    @property
    def complete(self) -> bool:
        """Whether every layer has factors. Until then, this waits for the device once per factor update."""
        if self._complete is None:
            self._complete = bool(together([block.seen.all() for block in self.blocks]).all())
        return self._complete

    @property
    def able(self) -> bool:
        """Whether hooks are installed."""
        return bool(self.taps.stages)

    # -- stacks -------------------------------------------------------------------------------------------------------

    def prepare(self, state: State, params: Sequence[nn.Parameter]) -> None:
        """Add zero factors to the state of every B in ``params`` that has none."""
        given = {id(p) for p in params}
        for pair in self.pairs:
            if id(pair.B) in given and "factor_updates" not in state[pair.B]:
                state[pair.B].update(factor_state(pair, self.structure))

    def bind(self, pairs: Sequence[StackedPair], others: Sequence[Stacked]) -> None:
        """Build blocks from the stacks. Sums that are staged for the same layers stay."""
        before, self.blocks = self.blocks, [Block(stacks, self.structure) for stacks in pairs]
        self._others, self._complete = list(others), None
        for block in self.blocks if before else ():
            block.adopt_sums(before)

    def unbind(self) -> None:
        """Drop the blocks, because their state was replaced."""
        self.blocks = []

    def follow_devices(self, state: State) -> None:
        """Move the factors to the layers' devices."""
        if any([block.follow_(state) for block in self.blocks]):
            self.stage()

    # -- statistics ---------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether this step's tokens are summed: for a sketch, or because a factor update is due."""
        return self.able and (self.sketching or due(step, self.settings.factor_interval))

    def arm(self, step: int) -> None:
        """Enable the hooks if :meth:`due`, with empty sums and a new token sample."""
        self.taps.enabled = self.due(step)
        if self.taps.enabled:
            self.stage()
            self.taps.turn(step)

    def stage(self) -> None:
        """Connect the hooks to empty sums."""
        for block in self.blocks:
            for index, stage in zip(block.indices, block.stages(self.settings.damping), strict=True):
                self.taps.stages[index] = stage

    def open_sketch(self, rank: int, state: State) -> bool:
        """Start sketching the whitened gradient for ``rank`` directions per layer; return False if a sketch is open."""
        if "sketch_range" in state[self.pairs[0].B]:
            return False
        for block in self.blocks:
            block.open_sketch(rank, state)
        return True

    def update(self, finite: Tensor, agreed: Any, loss_scale: LossScale | None = None) -> None:
        """Add the staged sums to the factors if the hooks were enabled."""
        if self.taps.enabled:
            self._commit(finite, agreed, loss_scale)

    def _commit(self, finite: Tensor, agreed: Any, loss_scale: LossScale | None) -> None:
        if not self._looked:
            checks.check_agreement(agreed, self.blocks)
        world = distributed.add_up([t for block in self.blocks for t in block.staged])
        tokens = counted = together([block.loss_tokens() for block in self.blocks]).amin()
        seen = torch.isfinite(tokens) & finite.to(tokens.device)
        if not self._looked:  # only once, because the check waits for the device
            self._looked = True
            checks.warn_if_blind(tokens, finite.to(tokens.device), self.pairs)
        tokens = torch.where(seen, tokens, 1.0)
        # Gradients of a sum loss need no scale. For a mean loss, each process divided by about tokens / world tokens.
        summed = tokens / world if self.settings.loss_reduction == "mean" else torch.ones_like(tokens)
        summed = summed / grad_scale(tokens)
        kept, new = (1.0, 1.0) if loss_scale is None else loss_scale.add(self._newest_weight() * seen)
        scale = TokenScale(tokens, summed, kept, new)
        for block in self.blocks:
            block.commit(scale.to(block.H.device), self.settings.factor_decay, seen.to(block.H.device))
        before = torch.full_like(tokens, torch.inf) if self._count is None else self._count.to(tokens.device)
        self._count = torch.where(seen, counted, before)
        self._complete = self._complete or None  # check again while some layers have no factors

    def _newest_weight(self) -> Tensor:
        """Return ``()`` the weight of this step in the averages of the layer with the most updates."""
        updates = together([block.b.tensors["factor_updates"].amax() for block in self.blocks]).amax()
        return newest_weight(updates + 1, self.settings.factor_decay)

    def refresh(self) -> int:
        """Recompute the eigenbases of D and H, and return the number of failed decompositions."""
        return refresh_bases(self.blocks)

    def forget(self, unless: Tensor | None = None) -> None:
        """Drop the staged sums; with ``unless``, a condition ``()`` on the device, only if it is false."""
        for block in self.blocks if self.taps.enabled else ():
            block.forget(unless)

    # -- the metric ---------------------------------------------------------------------------------------------------

    def quadratic(self, deltas: Mapping[Any, Tensor], done: Iterable[Any]) -> list[Tensor]:
        """Return the terms ``()`` of the quadratic form: one per block, and one per stack without factors.

        Layers and parameters without factors use the diagonal form from gradients.
        """
        known = list(done)
        rest = [block for block in self.blocks if block not in known]
        weight = self._weight()
        fallback = None if not rest or self.complete else weight
        forms = [block.quadratic(deltas, fallback) for block in rest]
        for stack in self._others:
            if stack in deltas:
                rough = over_parts(stack, diagonal_form(stack, deltas[stack]).sum())
                forms.append(weight.to(rough) * rough)
        return forms

    def _weight(self) -> Tensor:
        """Return ``()`` the factor that converts squared batch gradients into the per-token Fisher diagonal.

        For N loss tokens it is N for a mean loss and 1/N for a sum loss.
        """
        if self._count is None:
            return torch.ones((), device="cpu")
        tokens = torch.where(torch.isfinite(self._count), self._count, 1.0)
        return tokens if self.settings.loss_reduction == "mean" else 1 / tokens

    def penalties(self, coupling: float) -> dict[Any, Tensor]:
        """Return the gradients of ``trust_penalty KL(base || model)`` in the units of the loss's gradients.

        Args:
            coupling: coupling of the whole adapter, which converts the block-diagonal form into nats.

        Returns:
            ``(L, *shape)`` by stack; empty if ``trust_penalty`` is 0.
        """
        weight = self.settings.trust_penalty * coupling
        found: dict[Any, Tensor] = {}
        for block in self.blocks if weight else ():
            # Gradients of a sum loss are summed over all tokens and averaged over processes.
            tokens = 1 / (self._weight().to(block.H) * distributed.world_size())
            found |= block.penalties(weight * tokens if self.settings.loss_reduction == "sum" else weight)
        return found

    def settle(self) -> None:
        """Bring :attr:`state` up to date. This waits for the device."""
        tokens = 0.0 if self._count is None else float(self._count)
        self.state.tokens = tokens if math.isfinite(tokens) else 0.0

    def resume(self) -> None:
        """Continue with the numbers that were loaded into :attr:`state`."""
        tokens, device = self.state.tokens, self.pairs[0].B.device
        dtype = torch.promote_types(self.pairs[0].B.dtype, torch.float32)
        self._count = torch.tensor(tokens, device=device, dtype=dtype) if tokens else None

    def tokens(self) -> Tensor | None:
        """Return ``()`` the loss tokens of the last observed step; infinite while the hooks have seen no tokens."""
        return self._count

    def kl_form(self) -> Tensor | None:
        """Return ``()`` the sum of ``tr(D H) / 2`` over layers; None before stacks are bound."""
        return together([b.kl_from_base().sum() for b in self.blocks]).sum() if self.blocks else None

    def switches(self) -> list[Tensor]:
        """Return every layer's B, or this process's shard of it."""
        return [distributed.local(pair.B) for block in self.blocks for pair in block.pairs]

    def quiet(self) -> AbstractContextManager[None]:
        """Return a context in which the hooks observe no forward pass."""
        return self.taps.paused()

    def closer(self) -> Callable[[], None]:
        """Return the function that removes the hooks."""
        return self.taps.close
