"""K-FAC of LoRA layers: H and D exact, C and S structured, from hooks on ordinary forward and backward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.curvature.base import Curvature, Gradients, Stacked, StackedPair, State
from ctr_optim.curvature.blocks import Block, TokenScale, factor_state, refresh_bases
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
    """Numbers that a checkpoint carries: ``tokens``, loss tokens of a step when the taps were last open; 0: never."""

    tokens: float = 0.0


class KFAC(CurvatureBase):
    """Kronecker factors of every LoRA layer.

    Args:
        pairs: the layers; each one's B must be trained.
        settings: options of the optimizer.

    Attributes:
        taps: hooks on the layers.
        blocks: layers of one shape each, with factors; empty until stacks are bound.
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
        self._count: Tensor | None = None  # infinite until some layer's tokens are seen
        self.state = TokenState()

    @classmethod
    def build(cls, pairs: Sequence[LoRAPair], settings: Settings, prober: Gradients | None) -> Curvature:
        """Return the curvature of an optimizer: the metric from gradients where there are no LoRA layers."""
        return cls(pairs, settings) if pairs else Gradient()

    @property
    def complete(self) -> bool:
        """Whether every layer has factors; waits for the device until that is so, once a factor update."""
        if self._complete is None:
            self._complete = bool(together([block.seen.all() for block in self.blocks]).all())
        return self._complete

    @property
    def able(self) -> bool:
        """Whether there are layers with hooks."""
        return bool(self.taps.stages)

    # -- stacks -------------------------------------------------------------------------------------------------------

    def prepare(self, state: State, params: Sequence[nn.Parameter]) -> None:
        """Add empty factors to the state of every B among ``params`` that has none."""
        given = {id(p) for p in params}
        for pair in self.pairs:
            if id(pair.B) in given and "factor_updates" not in state[pair.B]:
                state[pair.B].update(factor_state(pair, self.structure))

    def bind(self, pairs: Sequence[StackedPair], others: Sequence[Stacked]) -> None:
        """Make blocks of the stacks; statistics staged for the same layers stay."""
        before, self.blocks = self.blocks, [Block(stacks, self.structure) for stacks in pairs]
        self._others, self._complete = list(others), None
        for block in self.blocks if before else ():
            block.adopt_sums(before)

    def unbind(self) -> None:
        """Drop the blocks, whose state was replaced."""
        self.blocks = []

    def follow_devices(self, state: State) -> None:
        """Move the factors to where the layers have been moved."""
        if any([block.follow_(state) for block in self.blocks]):
            self.stage()

    # -- statistics ---------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether this step's tokens are summed: while a sketch is open, and when factors are due."""
        return self.able and (self.sketching or due(step, self.settings.factor_interval))

    def arm(self, step: int) -> None:
        """Open the taps where factors are due."""
        self.taps.enabled = self.due(step)
        if self.taps.enabled:
            self.stage()
            self.taps.turn(step)

    def stage(self) -> None:
        """Give the taps empty sums for their tokens."""
        for block in self.blocks:
            for index, stage in zip(block.indices, block.stages(self.settings.damping), strict=True):
                self.taps.stages[index] = stage

    def open_sketch(self, rank: int, state: State) -> bool:
        """Begin to sketch the whitened gradient for ``rank`` directions a layer; False where one is open already."""
        if "sketch_range" in state[self.pairs[0].B]:
            return False
        for block in self.blocks:
            block.open_sketch(rank, state)
        return True

    def update(self, finite: Tensor, agreed: Any) -> None:
        """Fold the staged sums into the factors, where the taps were open."""
        if self.taps.enabled:
            self._commit(finite, agreed)

    def _commit(self, finite: Tensor, agreed: Any) -> None:
        if not self._looked:
            checks.check_agreement(agreed, self.blocks)
        world = distributed.add_up([t for block in self.blocks for t in block.staged])
        tokens = counted = together([block.loss_tokens() for block in self.blocks]).amin()
        seen = torch.isfinite(tokens) & finite.to(tokens.device)
        if not self._looked:  # once: it waits for the device
            self._looked = True
            checks.warn_if_blind(tokens, finite.to(tokens.device), self.pairs)
        tokens = torch.where(seen, tokens, 1.0)
        # a sum's gradients are per token as they are; a mean was taken by each process of its own tokens
        summed = tokens / world if self.settings.loss_reduction == "mean" else torch.ones_like(tokens)
        loss_scale = grad_scale()  # a number stays one: as a tensor it would make the host wait
        scale = TokenScale(tokens, summed / (loss_scale.to(tokens) if isinstance(loss_scale, Tensor) else loss_scale))
        for block in self.blocks:
            block.commit(scale.to(block.H.device), self.settings.factor_decay, seen.to(block.H.device))
        before = torch.full_like(tokens, torch.inf) if self._count is None else self._count.to(tokens.device)
        self._count = torch.where(seen, counted, before)
        self._complete = self._complete or None  # look again, as long as some layers have no factors

    def refresh(self) -> int:
        """Renew the eigenbases of D and H."""
        return refresh_bases(self.blocks)

    def forget(self, unless: Tensor | None = None) -> None:
        """Drop the staged sums."""
        for block in self.blocks if self.taps.enabled else ():
            block.forget(unless)

    # -- the metric ---------------------------------------------------------------------------------------------------

    def quadratic(self, deltas: Mapping[Any, Tensor], done: Iterable[Any]) -> list[Tensor]:
        """Terms of the K-FAC quadratic form, one a block; parameters without factors count by their gradients."""
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
        """``()`` factor from squared batch gradients to the per-token Fisher diagonal: N for a mean, 1/N for a sum."""
        if self._count is None:
            return torch.ones((), device="cpu")
        tokens = torch.where(torch.isfinite(self._count), self._count, 1.0)
        return tokens if self.settings.loss_reduction == "mean" else 1 / tokens

    def penalties(self, coupling: float) -> dict[Any, Tensor]:
        """Return the gradients of ``trust_penalty KL(base || model)`` by stack, in the units of the loss's gradients.

        Args:
            coupling: of the whole adapter, from the block-diagonal form to nats.
        """
        weight = self.settings.trust_penalty * coupling
        found: dict[Any, Tensor] = {}
        for block in self.blocks if weight else ():
            # a sum's gradients are those of all tokens, averaged over processes
            tokens = 1 / (self._weight().to(block.H) * distributed.world_size())
            found |= block.penalties(weight * tokens if self.settings.loss_reduction == "sum" else weight)
        return found

    def settle(self) -> None:
        """Bring :attr:`state` up to date; waits for the device."""
        tokens = 0.0 if self._count is None else float(self._count)
        self.state.tokens = tokens if math.isfinite(tokens) else 0.0

    def resume(self) -> None:
        """Go on with the numbers that were loaded into :attr:`state`."""
        tokens, device = self.state.tokens, self.pairs[0].B.device
        dtype = torch.promote_types(self.pairs[0].B.dtype, torch.float32)
        self._count = torch.tensor(tokens, device=device, dtype=dtype) if tokens else None

    def tokens(self) -> Tensor | None:
        """``()`` loss tokens of a step, when the taps were last open; infinite where no layer's tokens are seen."""
        return self._count

    def kl_form(self) -> Tensor | None:
        """``()`` the sum of ``tr(D H) / 2`` over layers."""
        return together([b.kl_from_base().sum() for b in self.blocks]).sum() if self.blocks else None

    def switches(self) -> list[Tensor]:
        """Every layer's B, as far as this process holds it."""
        return [distributed.local(pair.B) for block in self.blocks for pair in block.pairs]

    def quiet(self) -> AbstractContextManager[None]:
        """The taps let forward passes through unseen."""
        return self.taps.paused()

    def closer(self) -> Callable[[], None]:
        """Remove the taps."""
        return self.taps.close
