"""Blocks: stacked LoRA pairs of one shape with their Kronecker factors, and batched operations on them."""

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

OVERSAMPLED = 8  # columns of a sketch in addition to the requested directions


def factor_state(pair: LoRAPair, structure: type[Factor]) -> dict[str, Tensor]:
    """Return the zero factors of a pair that has no statistics yet. They are part of B's optimizer state.

    Args:
        pair: the LoRA layer.
        structure: structure of C and S.

    Returns:
        Tensors by state name, float32 or wider, on B's device.
    """
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
    """Scale that converts the gradients that the hooks see into gradients of the per-token loss.

    Attributes:
        tokens: ``()`` loss tokens N of this step, over micro-batches and processes.
        grad: ``()`` factor c such that ``c g`` is the gradient of the summed per-token loss.
        kept, new: ``()`` factors of the former averages and of this step's squared gradients, which remove the scale of
            the loss from the averages.
    """

    tokens: Tensor
    grad: Tensor
    kept: Tensor | float = 1.0
    new: Tensor | float = 1.0

    def to(self, device: torch.device) -> TokenScale:
        """Return this scale on another device."""
        moved = (x.to(device) if isinstance(x, Tensor) else x for x in (self.kept, self.new))
        return TokenScale(self.tokens.to(device), self.grad.to(device), *moved)


class Block:
    """LoRA pairs of one shape. H and D are full matrices ``(L, r, r)``; C and S are structured, batch dimension L.

    Args:
        stacks: stacks of the pairs.
        structure: structure of C and S.
    """

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
        """Reset the staged sums, and return the stage of each pair.

        Args:
            damping: of the sketch's whiteners, relative to the mean eigenvalue.
        """
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
        """Move all tensors to the layers' device and drop the staged sums; return whether the device changed."""
        device = self.pairs[0].B.device
        if device == self.H.device:
            return False
        for stack in (self.a, self.b):
            if stack is not None:
                stack.to_(device, state)
        self._bind()
        return True

    def adopt_sums(self, others: Iterable[Block]) -> None:
        """Take over the staged sums of the block in ``others`` that has the same pairs."""
        self._sums = next((o._sums for o in others if o.indices == self.indices), None)

    @property
    def staged(self) -> list[Tensor]:
        """Staged sums, which the processes add up before a commit; empty if nothing was staged."""
        return [] if self._sums is None else self._sums.tensors

    def whiteners(self, damping: float) -> tuple[Any, Any]:
        """Return the whiteners of the current C and S; ``damping`` is relative to the mean eigenvalue."""
        return self.C.whitener(damping), self.S.whitener(damping)

    def open_sketch(self, rank: int, state: Any) -> None:
        """Start sketching the whitened gradient for ``rank`` candidate directions per layer."""
        for name, empty in sketch_state(self.pairs[0], rank).items():
            self.b.hold(name, empty.repeat(len(self.pairs), 1, 1), state)
            self.sketch.append(self.b.tensors[name])

    def drop_sketch(self, state: Any) -> None:
        """Remove the sketch from the optimizer's state. The caller must rebuild the stacks afterwards."""
        drop_sketches(state, self.pairs)

    def test_matrices(self) -> tuple[Tensor, Tensor]:
        """Return Gaussian Omega ``(d_in, k)`` and Psi ``(d_out, l)``, equal in every process and every run."""
        range_, corange = self.sketch
        omega, psi = _gaussians(corange.shape[-1], range_.shape[-2], range_.shape[-1], corange.shape[-2])
        return omega.to(range_), psi.to(range_)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return A ``(L, r, d_in)`` and B ``(L, d_out, r)`` in the factors' dtype."""
        a = distributed.stack_whole([pair.A.detach() for pair in self.pairs])
        return a.to(self.H.dtype), self.b.values()

    def forget(self, unless: Tensor | None = None) -> None:
        """Drop the staged sums; with ``unless``, a condition ``()`` on the device, only if it is false."""
        if self._sums is not None:
            self._sums.forget() if unless is None else self._sums.keep_if(unless)

    def loss_tokens(self) -> Tensor:
        """Return ``()`` the smallest number of tokens with a gradient over the pairs that have any; else infinity."""
        rows = self.staged[0]
        return torch.where(rows > 0, rows, torch.inf).amin()

    def commit(self, scale: TokenScale, decay: float, finite: Tensor) -> None:
        """Add the staged sums to the moving averages of the factors.

        The update is ``E <- E + w (new - E)`` with ``w = (1 - decay) / (1 - decay^n)``, bias-corrected from the first
        of n updates on. ``scale`` makes the averages of squared gradients follow the loss's average scale. A pair
        without tokens, or with a sum that is not finite, keeps its averages. A pair whose averages are not finite
        restarts them: only a fault causes this, because commit() never adds such a sum.

        Args:
            scale: converts the sums to the per-token loss.
            decay: decay of the moving averages.
            finite: ``()`` whether this step's gradients are finite; if not, all averages stay.
        """
        rows, h, d, *wide = self.staged
        n = len(self.structure.fields)
        targets = [self.H, *self.C.tensors, self.D, *self.S.tensors]
        # One concatenated tensor saves kernel launches, which take longer than the arithmetic.
        averages = _side_by_side(targets)
        of_inputs = _side_by_side([h, *wide[:n]]) / rows.clamp_min(1).unsqueeze(-1)
        of_gradients = _side_by_side([d, *wide[n : 2 * n]]) * (scale.new * scale.grad**2 / scale.tokens)
        means = torch.cat([of_inputs, of_gradients], 1)
        seen = (rows > 0) & finite & _finite([means, *wide[2 * n :]])
        sound = _finite([averages])
        updates = self.b.tensors["factor_updates"]
        updates.mul_(sound).add_(seen)
        weight = newest_weight(updates, decay) * seen
        averages.masked_fill_(~sound.unsqueeze(-1), 0)
        averages[:, of_inputs.shape[1] :] *= scale.kept
        averages.lerp_(means.masked_fill_(~seen.unsqueeze(-1), 0), weight.unsqueeze(-1))
        for target, average in zip(targets, torch.split(averages, [t[0].numel() for t in targets], 1), strict=True):
            target.copy_(average.view_as(target))
        sketch_sums = self._sums.sketch if self._sums is not None and self.sketch else None
        sketched = () if sketch_sums is None else sketch_sums.whitened()
        for sketch, new in zip(self.sketch, sketched, strict=True):
            sketch += torch.where(seen.view(-1, 1, 1), new * (scale.grad / scale.tokens), 0)

    def bases(self) -> list[tuple[Stacked, Tensor]]:
        """Return each stack with the factor ``(L, r, r)`` whose eigenbasis it uses: A with D, B with H."""
        return [(stack, factor) for stack, factor in ((self.a, self.D), (self.b, self.H)) if stack is not None]

    @property
    def seen(self) -> Tensor:
        """``(L,)`` whether each layer has factors."""
        return self.b.tensors["factor_updates"] > 0

    def _delta_a(self, deltas: Mapping[Stacked, Tensor]) -> Tensor | None:
        """Return the step of A ``(L, r, d_in)``, which may belong to another layer's stack; None if A does not move."""
        if self.a is not None:
            return deltas.get(self.a)
        if not self.borrowed or any(stack not in deltas for stack, _ in self.borrowed):
            return None
        return torch.stack([deltas[stack][row] for stack, row in self.borrowed])

    def quadratic(self, deltas: Mapping[Stacked, Tensor], fallback: Tensor | None = None) -> Tensor:
        """Return ``()`` the quadratic form of these layers' part of a step.

        Args:
            deltas: the step, ``(L, *shape)`` for each stack.
            fallback: ``()`` weight of the diagonal form from gradients, for layers without factors; None if all layers
                have factors.
        """
        delta_a, delta_b = self._delta_a(deltas), deltas.get(self.b)
        form = quadratic(delta_a, delta_b, *self.weights(), self.H, self.D, self.C, self.S)
        if fallback is not None:
            halves = [(s, deltas[s]) for s in (self.a, self.b) if s is not None and s in deltas]
            for stack, delta in halves:
                rough = fallback.to(form) * diagonal_form(stack, delta)
                form = torch.where(self.seen, form, form + rough)  # without factors, form is 0
        return form.sum()

    def penalties(self, weight: float | Tensor) -> dict[Any, Tensor]:
        """Return the gradients of ``weight tr(D H) / 2``, the weighted block-diagonal KL from the base model.

        They are ``weight D A C`` for A and ``weight S B H`` for B.

        Returns:
            ``(L, *shape)`` by stack.
        """
        gradients = penalty_gradients(*self.weights(), self.H, self.D, self.C, self.S)
        halves = zip((self.a, self.b), gradients, strict=True)
        return {stack: 0.5 * weight * gradient for stack, gradient in halves if stack is not None}

    def kl_from_base(self) -> Tensor:
        """Return ``(L,)`` each layer's share ``tr(D H) / 2`` of the block-diagonal KL from the base model."""
        return 0.5 * (self.D * self.H.mT).sum((-2, -1))


def newest_weight(updates: Tensor, decay: float) -> Tensor:
    """Return the weight of the newest of ``updates`` samples in a bias-corrected moving average; same shape.

    Args:
        updates: number of updates, the newest included.
        decay: decay of the moving average.
    """
    return (1 - decay) / (1 - decay ** updates.clamp_min(1))


@lru_cache(maxsize=32)
def _gaussians(d_in: int, d_out: int, columns: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return Omega and Psi for layers of one shape, on the CPU. The cache avoids drawing them again, which is slow."""
    generator = torch.Generator().manual_seed(d_in * 1_000_003 + d_out)
    shapes = (d_in, columns), (d_out, rows)
    omega, psi = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes)
    return omega, psi


def refresh_bases(blocks: Iterable[Block]) -> int:
    """Recompute the eigenbases of all stacks, batched over ranks.

    Returns:
        The number of stacks whose decomposition failed; these keep their previous bases.
    """
    alike: dict[Any, list[tuple[Stacked, Tensor]]] = {}
    for stack, factor in (pair for block in blocks for pair in block.bases()):
        # Zero-padding smaller ranks lets one batched call serve many stacks: launches cost more than arithmetic.
        kind = (padded_rank(factor.shape[-1]), factor.dtype, factor.device)
        alike.setdefault(kind, []).append((stack, factor))
    failed = 0
    for some in alike.values():
        room = max(factor.shape[-1] for _, factor in some)
        previous = [stack.tensors["basis"] for stack, _ in some]
        old = torch.cat([padded_basis(basis, room) for basis in previous])
        new = eigenbasis(torch.cat([sized(factor, (-2, -1), room) for _, factor in some]), old)
        if new is old:  # one failure fails the whole batch, so retry each stack separately
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
    """Flatten and concatenate the tensors ``(L, ...)`` to one row per layer, ``(L, *)``."""
    return torch.cat([t.flatten(1) for t in tensors], 1)


def _finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``(L,)`` whether all entries of each layer are finite.

    Testing the sums saves one pass and one launch per tensor.
    """
    return torch.isfinite(torch.stack([t.flatten(1).sum(1) for t in tensors])).all(0)


def sketch_state(pair: LoRAPair, rank: int) -> dict[str, Tensor]:
    """Return empty sketches of the whitened gradient for ``rank`` candidate directions; part of B's optimizer state.

    Returns:
        range ``(d_out, k)`` and corange ``(l, d_in)`` by state name, float32 or wider. k is ``rank`` plus
        :data:`OVERSAMPLED`, at most the layer's widths.
    """
    d_out, d_in = pair.B.shape[0], pair.A.shape[1]
    columns = min(rank + OVERSAMPLED, d_in, d_out)
    dtype = torch.promote_types(pair.B.dtype, torch.float32)
    return {
        "sketch_range": torch.zeros(d_out, columns, dtype=dtype, device=pair.B.device),
        "sketch_corange": torch.zeros(min(2 * columns, d_out), d_in, dtype=dtype, device=pair.B.device),
    }


def drop_sketches(state: Any, pairs: Iterable[LoRAPair]) -> None:
    """Remove the pairs' sketches from the state. The caller must rebuild the stacks afterwards."""
    for pair in pairs:
        for name in ("sketch_range", "sketch_corange"):
            state[pair.B].pop(name, None)
