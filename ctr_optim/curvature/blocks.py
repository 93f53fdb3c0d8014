"""LoRA pairs of one shape, stacked: their factors, and the batched work on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ctr_optim.curvature.base import Stacked, StackedPair
from ctr_optim.curvature.capture import Stage
from ctr_optim.curvature.factors import Factor
from ctr_optim.curvature.forms import penalty_gradients, quadratic
from ctr_optim.curvature.gradient import diagonal_form
from ctr_optim.curvature.sketch import Sketch
from ctr_optim.curvature.sums import Sums
from ctr_optim.linalg.eigen import eigenbasis, padded_basis
from ctr_optim.linalg.shapes import padded_rank, sized
from ctr_optim.model.pair import LoRAPair
from ctr_optim.runtime import distributed

OVERSAMPLED = 8  # columns of a sketch beyond the directions that are wanted


def factor_state(pair: LoRAPair, structure: type[Factor]) -> dict[str, Tensor]:
    """A pair's factors before anything was seen; they live in the optimizer's state of B."""
    b = pair.B
    dtype = torch.promote_types(b.dtype, torch.float32)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=b.device)

    state = {"factor_updates": zeros(), "rank_input": zeros(pair.rank, pair.rank)}
    state["rank_output"] = zeros(pair.rank, pair.rank)
    for side, width in (("input", pair.A.shape[1]), ("output", b.shape[0])):
        for field, shape in zip(structure.fields, structure.shapes(width), strict=True):
            state[f"{side}_{field}"] = zeros(*shape)
    return state


@dataclass(frozen=True)
class TokenScale:
    """How the gradients seen by the taps become gradients of the per-token loss.

    Attributes:
        tokens: ``()`` loss tokens N of this step, over micro-batches and processes.
        grad: ``()`` factor c such that ``c g`` is the gradient of the summed per-token loss.
    """

    tokens: Tensor
    grad: Tensor

    def to(self, device: torch.device) -> TokenScale:
        """The same on another device."""
        return TokenScale(self.tokens.to(device), self.grad.to(device))


class Block:
    """Pairs of one shape. ``H, D`` are exact ``(L, r, r)``; ``C, S`` are structured, batch dimension L."""

    def __init__(self, stacks: StackedPair, structure: type[Factor]) -> None:
        self.pairs, self.indices, self.structure = list(stacks.pairs), list(stacks.indices), structure
        self.a, self.b, self.borrowed = stacks.a, stacks.b, stacks.borrowed
        self._bind()

    def _bind(self) -> None:
        t, structure = self.b.tensors, self.structure
        self.H, self.D = t["rank_input"], t["rank_output"]
        self.C = structure(*(t[f"input_{f}"] for f in structure.fields))
        self.S = structure(*(t[f"output_{f}"] for f in structure.fields))
        self.sketch = [t[name] for name in ("sketch_range", "sketch_corange") if name in t]
        self._sums: Sums | None = None

    # -- capture ------------------------------------------------------------------------------------------------

    def stages(self, damping: float) -> list[Stage]:
        """Return an empty place for the tokens of each pair."""
        if self._sums is None:
            rows, h, d = (torch.zeros_like(t) for t in (self.b.tensors["factor_updates"], self.H, self.D))
            wide = (self.structure(*(torch.zeros_like(t) for t in factor.tensors)) for factor in (self.C, self.S))
            self._sums = Sums(rows, h, d, *wide)
        if self.sketch:
            if self._sums.sketch is None:
                range_, corange = (torch.zeros_like(t) for t in self.sketch)
                self._sums.sketch = Sketch(range_, corange, *self.test_matrices(), self.structure)
            self._sums.sketch.aim(*self.whiteners(damping))
        self._sums.forget()
        return [Stage(self._sums, index) for index in range(len(self.pairs))]

    def follow_(self, state: Any) -> bool:
        """Move all tensors to the layers' device, drop the staged sums, and return whether the device changed."""
        device = self.pairs[0].B.device
        if device == self.H.device:
            return False
        for stack in (self.a, self.b):
            if stack is not None:
                stack.to_(device, state)
        self._bind()
        return True

    def adopt_sums(self, others: Iterable[Block]) -> None:
        """Take over what the taps staged for these same pairs in one of ``others``."""
        self._sums = next((o._sums for o in others if o.indices == self.indices), None)

    @property
    def staged(self) -> list[Tensor]:
        """Sums that processes add up before a commit."""
        return [] if self._sums is None else self._sums.tensors

    def whiteners(self, damping: float) -> tuple[Any, Any]:
        """Whiteners of C and S, as the factors stand now."""
        return self.C.whitener(damping), self.S.whitener(damping)

    def open_sketch(self, rank: int, state: Any) -> None:
        """Begin to sketch the whitened gradient for ``rank`` candidate directions a layer."""
        for name, empty in sketch_state(self.pairs[0], rank).items():
            self.b.hold(name, empty.repeat(len(self.pairs), 1, 1), state)
            self.sketch.append(self.b.tensors[name])

    def drop_sketch(self, state: Any) -> None:
        """Remove the sketch from the optimizer's state; the stacks must be built anew afterwards."""
        drop_sketches(state, self.pairs)

    def test_matrices(self) -> tuple[Tensor, Tensor]:
        """Gaussian Omega ``(d_in, k)`` and Psi ``(d_out, l)``, the same on every process and in every run."""
        range_, corange = self.sketch
        omega, psi = _gaussians(corange.shape[-1], range_.shape[-2], range_.shape[-1], corange.shape[-2])
        return omega.to(range_), psi.to(range_)

    def weights(self) -> tuple[Tensor, Tensor]:
        """A ``(L, r, d_in)`` and B ``(L, d_out, r)`` in the factors' dtype."""
        a = distributed.stack_whole([pair.A.detach() for pair in self.pairs])
        return a.to(self.H.dtype), self.b.values()

    def forget(self, unless: Tensor | None = None) -> None:
        """Drop what the taps have staged so far; ``unless``: ``()`` condition on the device."""
        if self._sums is not None:
            self._sums.forget() if unless is None else self._sums.keep_if(unless)

    def loss_tokens(self) -> Tensor:
        """``()`` the fewest tokens that any of these pairs saw a gradient on; infinite where none saw any."""
        rows = self.staged[0]
        return torch.where(rows > 0, rows, torch.inf).amin()

    def commit(self, scale: TokenScale, decay: float, finite: Tensor) -> None:
        """Fold the staged sums into the moving averages; pairs without tokens or with infinite sums keep theirs.

        A pair whose averages are not finite (a fault, because no such sum is added) restarts them.

        ``E <- E + w (new - E)`` with ``w = (1 - decay) / (1 - decay^n)``: bias-corrected from the first update on.
        """
        rows, h, d, *wide = self.staged
        n = len(self.structure.fields)
        targets = [self.H, *self.C.tensors, self.D, *self.S.tensors]
        # side by side, for a launch takes longer than the arithmetic
        averages = _side_by_side(targets)
        of_inputs = _side_by_side([h, *wide[:n]]) / rows.clamp_min(1).unsqueeze(-1)
        of_gradients = _side_by_side([d, *wide[n : 2 * n]]) * (scale.grad**2 / scale.tokens)
        means = torch.cat([of_inputs, of_gradients], 1)
        seen = (rows > 0) & finite & _finite([means, *wide[2 * n :]])
        sound = _finite([averages])
        updates = self.b.tensors["factor_updates"]
        updates.mul_(sound).add_(seen)
        weight = (1 - decay) / (1 - decay ** updates.clamp_min(1)) * seen
        averages.masked_fill_(~sound.unsqueeze(-1), 0)
        averages.lerp_(means.masked_fill_(~seen.unsqueeze(-1), 0), weight.unsqueeze(-1))
        for target, average in zip(targets, torch.split(averages, [t[0].numel() for t in targets], 1), strict=True):
            target.copy_(average.view_as(target))
        sketch_sums = self._sums.sketch if self._sums is not None and self.sketch else None
        sketched = () if sketch_sums is None else sketch_sums.whitened()
        for sketch, new in zip(self.sketch, sketched, strict=True):
            sketch += torch.where(seen.view(-1, 1, 1), new * (scale.grad / scale.tokens), 0)

    def bases(self) -> list[tuple[Stacked, Tensor]]:
        """Return stacks with the factor that gives their eigenbasis: A with D, B with H."""
        return [(stack, factor) for stack, factor in ((self.a, self.D), (self.b, self.H)) if stack is not None]

    @property
    def seen(self) -> Tensor:
        """``(L,)`` whether a layer has factors."""
        return self.b.tensors["factor_updates"] > 0

    def _delta_a(self, deltas: Mapping[Stacked, Tensor]) -> Tensor | None:
        """``(L, r, d_in)`` the step of A, which another layer's stack may hold; None where A does not move."""
        if self.a is not None:
            return deltas.get(self.a)
        if not self.borrowed or any(stack not in deltas for stack, _ in self.borrowed):
            return None
        return torch.stack([deltas[stack][row] for stack, row in self.borrowed])

    def quadratic(self, deltas: Mapping[Stacked, Tensor], fallback: Tensor | None = None) -> Tensor:
        """``()`` the quadratic form of these layers' part of a step.

        Args:
            deltas: the step.
            fallback: ``()`` weight of the form from gradients, for layers without factors; None: all have factors.
        """
        delta_a, delta_b = self._delta_a(deltas), deltas.get(self.b)
        form = quadratic(delta_a, delta_b, *self.weights(), self.H, self.D, self.C, self.S)
        if fallback is not None:
            halves = [(s, deltas[s]) for s in (self.a, self.b) if s is not None and s in deltas]
            for stack, delta in halves:
                rough = fallback.to(form) * diagonal_form(stack, delta)
                form = torch.where(self.seen, form, form + rough)  # factors that are zero add nothing
        return form.sum()

    def penalties(self, weight: float | Tensor) -> dict[Any, Tensor]:
        """Gradients ``(L, *shape)`` of ``weight tr(D H) / 2``, the block-diagonal KL from the base model, by stack.

        For a given D and H: ``D A C`` and ``S B H``.
        """
        gradients = penalty_gradients(*self.weights(), self.H, self.D, self.C, self.S)
        halves = zip((self.a, self.b), gradients, strict=True)
        return {stack: 0.5 * weight * gradient for stack, gradient in halves if stack is not None}

    def kl_from_base(self) -> Tensor:
        """``(L,)`` block-diagonal share of each adapter in the KL from the base model, ``tr(D H) / 2``."""
        return 0.5 * (self.D * self.H.mT).sum((-2, -1))


@lru_cache(maxsize=32)
def _gaussians(d_in: int, d_out: int, columns: int, rows: int) -> tuple[Tensor, Tensor]:
    """Omega and Psi of layers of one shape, on the host: drawing them takes longer than all that is done with them."""
    generator = torch.Generator().manual_seed(d_in * 1_000_003 + d_out)
    shapes = (d_in, columns), (d_out, rows)
    omega, psi = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes)
    return omega, psi


def refresh_bases(blocks: Iterable[Block]) -> int:
    """New eigenbases for all stacks, many ranks at once; returns how many failed and kept the old ones."""
    alike: dict[Any, list[tuple[Stacked, Tensor]]] = {}
    for stack, factor in (pair for block in blocks for pair in block.bases()):
        # Zero-pad smaller ranks so that one batched call serves many stacks: launches cost more than arithmetic.
        kind = (padded_rank(factor.shape[-1]), factor.dtype, factor.device)
        alike.setdefault(kind, []).append((stack, factor))
    failed = 0
    for some in alike.values():
        room = max(factor.shape[-1] for _, factor in some)
        previous = [stack.tensors["basis"] for stack, _ in some]
        old = torch.cat([padded_basis(basis, room) for basis in previous])
        new = eigenbasis(torch.cat([sized(factor, (-2, -1), room) for _, factor in some]), old)
        if new is old:  # one that does not converge takes all others with it: each by itself
            found = [eigenbasis(factor, basis) for (_, factor), basis in zip(some, previous, strict=True)]
        else:
            parts = torch.split(new, [len(basis) for basis in previous])
            found = [sized(part, (-2, -1), basis.shape[-1]) for part, basis in zip(parts, previous, strict=True)]
        for (stack, _), basis, before in zip(some, found, previous, strict=True):
            if basis is before:
                failed += 1
            else:
                stack.set_basis(basis)
    return failed


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """``(L, *)`` all that L layers have, a row each."""
    return torch.cat([t.flatten(1) for t in tensors], 1)


def _finite(tensors: Sequence[Tensor]) -> Tensor:
    """``(L,)`` whether all of a layer's entries are; by their sums, a pass and a launch less for each tensor."""
    return torch.isfinite(torch.stack([t.flatten(1).sum(1) for t in tensors])).all(0)


def sketch_state(pair: LoRAPair, rank: int) -> dict[str, Tensor]:
    """Empty sketches of the whitened gradient for ``rank`` candidate directions, oversampled; in the state of B."""
    d_out, d_in = pair.B.shape[0], pair.A.shape[1]
    columns = min(rank + OVERSAMPLED, d_in, d_out)
    dtype = torch.promote_types(pair.B.dtype, torch.float32)
    return {
        "sketch_range": torch.zeros(d_out, columns, dtype=dtype, device=pair.B.device),
        "sketch_corange": torch.zeros(min(2 * columns, d_out), d_in, dtype=dtype, device=pair.B.device),
    }


def drop_sketches(state: Any, pairs: Iterable[LoRAPair]) -> None:
    """Take the pairs' sketches out of the state; whoever holds stacks of it stacks anew."""
    for pair in pairs:
        for name in ("sketch_range", "sketch_corange"):
            state[pair.B].pop(name, None)
