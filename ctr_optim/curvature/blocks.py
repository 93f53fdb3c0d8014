"""LoRA pairs of one shape, stacked: their factors, and the batched work on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctr_optim.curvature.capture import Sketch, Stage
from ctr_optim.curvature.factors import Factor, eigenbasis
from ctr_optim.lora import LoRAPair
from ctr_optim.precondition import Stack


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
    grad: Tensor | float


class Block:
    """Pairs of one shape. ``H, D`` are exact ``(L, r, r)``; ``C, S`` are structured, batch dimension L."""

    def __init__(
        self, pairs: Sequence[LoRAPair], indices: Sequence[int], a: Stack | None, b: Stack, structure: type[Factor]
    ) -> None:
        self.pairs, self.indices, self.a, self.b, self.structure = list(pairs), list(indices), a, b, structure
        t = b.tensors
        self.H, self.D = t["rank_input"], t["rank_output"]
        self.C = structure(*(t[f"input_{f}"] for f in structure.fields))
        self.S = structure(*(t[f"output_{f}"] for f in structure.fields))
        self._staged: list[Tensor] = []
        self._sketched: list[Tensor] = []

    # -- capture ------------------------------------------------------------------------------------------------

    def stages(self, sketch_rank: int = 0, damping: float = 0.0) -> list[Stage]:
        """Empty stages for the taps, one a pair: views into stacked sums."""
        if not self._staged:
            rows = torch.zeros_like(self.b.tensors["factor_updates"])
            self._staged = [rows] + [
                torch.zeros_like(x) for x in (self.H, self.D, *self.C.tensors, *self.S.tensors)
            ]
        else:
            torch._foreach_zero_(self._staged)
        sketches = self._sketches(sketch_rank, damping) if sketch_rank else [None] * len(self.pairs)
        rows, h, d, *wide = self._staged
        n = len(self.structure.fields)
        return [
            Stage(rows[i], h[i], d[i], self.structure(*(t[i] for t in wide[:n])),
                  self.structure(*(t[i] for t in wide[n:])), sketches[i])
            for i in range(len(self.pairs))
        ]  # fmt: skip

    def _sketches(self, rank: int, damping: float) -> list[Sketch | None]:
        d_in, d_out = self.pairs[0].A.shape[1], self.pairs[0].B.shape[0]
        shape = {"sketch_range": (d_out, min(rank, d_in, d_out)), "sketch_corange": (min(2 * rank, d_in, d_out), d_in)}
        range_, corange = (
            torch.zeros(len(self.pairs), *shape[k], dtype=self.H.dtype, device=self.H.device) for k in shape
        )
        self._sketched = [range_, corange]
        omega, psi = test_matrices(d_in, d_out, rank, self.H)
        whiten_in, whiten_out = self.C.whitener(damping), self.S.whitener(damping)

        def of(whitener: Tensor | tuple[Tensor, ...], i: int) -> Tensor | tuple[Tensor, ...]:
            return whitener[i] if isinstance(whitener, Tensor) else tuple(w[i] for w in whitener)

        return [
            Sketch(range_[i], corange[i], omega, psi, of(whiten_in, i), of(whiten_out, i), self.structure)
            for i in range(len(self.pairs))
        ]

    @property
    def staged(self) -> list[Tensor]:
        """Everything that processes add up before a commit."""
        return [*self._staged, *self._sketched]

    def loss_tokens(self) -> Tensor:
        """``()`` the fewest tokens that any of these pairs saw a gradient on; infinite where none saw any."""
        rows = self._staged[0]
        return torch.where(rows > 0, rows, torch.inf).amin()

    def commit(self, scale: TokenScale, decay: float, finite: Tensor) -> None:
        """Fold the staged sums into the moving averages; pairs not seen, or with sums not finite, stay as they are.

        ``E <- E + w (new - E)`` with ``w = (1 - decay) / (1 - decay^n)``: bias-corrected from the first update on.
        """
        rows, h, d, *wide = self._staged
        n = len(self.structure.fields)
        seen = (rows > 0) & finite
        for t in self._staged:
            seen = seen & torch.isfinite(t).flatten(1).all(1) if t.dim() > 1 else seen
        updates = self.b.tensors["factor_updates"]
        updates += seen
        weight = (1 - decay) / (1 - decay ** updates.clamp_min(1)) * seen
        grad_square = scale.grad**2 / scale.tokens
        per_row = 1 / rows.clamp_min(1)
        targets = [self.H, self.D, *self.C.tensors, *self.S.tensors]
        factors = [per_row, grad_square, *[per_row] * n, *[grad_square] * n]
        for old, new, factor in zip(targets, (h, d, *wide), factors, strict=True):
            wide_view = (-1,) + (1,) * (old.dim() - 1)
            factor = factor.view(wide_view) if factor.dim() else factor
            old.lerp_(torch.where(seen.view(wide_view), new * factor, 0), weight.view(wide_view))

    def refresh_bases(self) -> None:
        """New eigenbases of D (for A) and H (for B)."""
        for stack, factor in ((self.a, self.D), (self.b, self.H)):
            if stack is not None:
                stack.set_basis(eigenbasis(factor, stack.tensors["basis"]))

    def kl_from_base(self) -> Tensor:
        """``(L,)`` block-diagonal prediction of each adapter's KL from the base model, ``tr(D H) / 2``, in nats a token."""
        return 0.5 * (self.D * self.H.mT).sum((-2, -1))


def test_matrices(d_in: int, d_out: int, rank: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussian ``(d_in, k)`` and ``(d_out, l)``, the same on every process and in every run."""
    generator = torch.Generator().manual_seed(d_in * 1_000_003 + d_out)
    k, size = min(rank, d_in, d_out), min(2 * rank, d_in, d_out)
    return torch.randn(d_in, k, generator=generator).to(like), torch.randn(d_out, size, generator=generator).to(like)
