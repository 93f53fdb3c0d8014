"""The step of LoRA pairs in Triton kernels: equal to that of ``Block`` and ``Stack`` up to rounding, and faster.

A step in torch passes over the moments a dozen times and launches hundreds of kernels. The Triton kernels need three
passes and about a dozen launches. The torch operations are the reference, and handle all blocks that the kernels do not
support (see :func:`suits`).
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ctr_optim.curvature.factors.base import Factor
from ctr_optim.direction.stack import Stack
from ctr_optim.linalg.products import combine
from ctr_optim.linalg.shapes import padded_rank
from ctr_optim.model.pair import LoRAPair
from ctr_optim.runtime import distributed
from ctr_optim.runtime.messages import users_line

SLICES = 32  # kernel programs per weight: each handles one slice of a layer's A or B
# Tile width and number of warps by padded rank. The r x r matrices and a tile per wide tensor must fit in registers.
TILES = {16: (64, 4), 32: (32, 4), 64: (16, 8)}

_broken = False


class FactoredPair(Protocol):
    """LoRA pairs of one shape with their stacks and Kronecker factors."""

    pairs: list[LoRAPair]
    structure: type[Factor]
    H: Tensor
    D: Tensor
    C: Factor
    S: Factor

    @property
    def a(self) -> Any: ...
    @property
    def b(self) -> Any: ...


@functools.cache
def _kernels() -> Any:
    """Return the module of the kernels; None if Triton is not installed."""
    try:
        from ctr_optim.direction import kernels
    except ImportError:
        return None
    return kernels


def suits(block: FactoredPair) -> bool:
    """Whether the kernels support a block.

    They need trained A and B, unsharded on a GPU, with float32 state, diagonal C and S, and ``foreach=None``. The rank
    is at most the largest in :data:`TILES`. Retained-text coordinates are not supported.
    """
    a, b = block.a, block.b
    if a is None or a.retained or not block.structure.is_diagonal or block.pairs[0].rank > max(TILES):
        return False
    return all(
        stack.dtype == torch.float32
        and stack.group["foreach"] is None
        and stack.params[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not distributed.is_sharded(stack.params[0])
        and (stack.params[0].is_cuda or os.environ.get("TRITON_INTERPRET") == "1")  # tests run on the CPU
        for stack in (a, b)
    )


class Fused:
    """Runs the part of a step that the kernels support; the caller runs the rest in torch.

    Call :meth:`look`, :meth:`directions` and :meth:`move_`, in this order.

    Args:
        blocks: candidates; unsupported blocks, and blocks on another device than the first supported one, are ignored.

    Attributes:
        blocks: the supported blocks.
        stacks: their stacks of A and B.
        params: ids of their parameters.
    """

    def __init__(self, blocks: Iterable[FactoredPair]) -> None:
        usable = [block for block in blocks if suits(block)] if not _broken else []
        self.blocks = [block for block in usable if block.H.device == usable[0].H.device and _kernels()]
        self.stacks = [stack for block in self.blocks for stack in (block.a, block.b) if stack is not None]
        self.params = frozenset(id(p) for stack in self.stacks for p in stack.params)
        self._counts = [len(stack.params) for stack in self.stacks]
        self._addresses: list[int] = []
        self._aligned = False
        if self.stacks:
            self._table = torch.zeros(sum(self._counts), 2, dtype=torch.int64, device=self.blocks[0].H.device)
            self._rows = dict(zip(self.stacks, torch.split(self._table, self._counts), strict=True))

    def look(self) -> Tensor | None:
        """Return ``()`` whether every gradient is finite; None if the kernels do not support this step.

        They need a dense, contiguous gradient for every parameter, in the dtype and on the device of the parameter.
        """
        if not self.stacks or _broken or not self._found():
            return None
        infinite = torch.empty(sum(self._counts), 8, dtype=torch.int32, device=self._table.device)
        with self._trying():
            for stack, part in zip(self.stacks, torch.split(infinite, self._counts), strict=True):
                numel = stack.params[0].numel()
                _kernels().find_infinite[part.shape](self._rows[stack], part, numel, **self._layout(stack), TILE=2048)
            return ~infinite.any()
        return None

    def directions(self, finite: Tensor) -> tuple[dict[Stack, Tensor], tuple[Tensor, Tensor] | None]:
        """Update the moments, and return the step before the trust region, its quadratic form and its slope.

        The results equal those of ``Stack.direction``, ``Block.quadratic`` and ``Stack.slope`` up to rounding.

        Args:
            finite: ``()`` whether all gradients are finite; if not, the moments stay and the step is zero.

        Returns:
            The step ``(L, *shape)`` for each stack, and its form ``()`` and slope ``()``. If a kernel fails, the
            remaining stacks are unchanged and missing, and None replaces form and slope.
        """
        deltas: dict[Stack, Tensor] = {}
        pairs = [len(block.pairs) for block in self.blocks]
        sums = torch.empty(5, sum(pairs), SLICES, device=self._table.device)
        with self._trying():
            for block, parts in zip(self.blocks, torch.split(sums, pairs, dim=1), strict=True):
                assert block.a is not None
                square_a, square_b, cross, slope_a, slope_b = parts
                live = _live(block.b, finite)
                gram = sums.new_empty(*square_b.shape, *block.H.shape[1:])
                # B comes first, because A's kernel needs the sums dB^T S B of B's kernel for the cross term.
                deltas[block.b] = self._direction(block.b, block.H, block.S, gram, square_b, cross, slope_b, live)
                grams = gram.sum(1)
                deltas[block.a] = self._direction(block.a, block.D, block.C, grams, square_a, cross, slope_a, live)
        if deltas:
            lives = [_live(stack, finite) for stack in deltas]
            torch._foreach_add_([stack.tensors["step"] for stack in deltas], lives)
        if len(deltas) < len(self.stacks):
            return deltas, None
        *forms, slope_a, slope_b = sums.sum(-1)
        return deltas, (combine(*forms).sum(), (slope_a + slope_b).sum())

    def move_(self, deltas: Mapping[Stack, Tensor], scale: Tensor) -> list[Stack]:
        """Apply ``p <- p + scale delta`` as ``Stack.move_`` does, and return the moved stacks.

        Args:
            deltas: the step, ``(L, *shape)`` for each stack.
            scale: ``()``.
        """
        moved: list[Stack] = []
        scale = scale.to(self._table.device)
        with self._trying():
            for stack in () if _broken else self.stacks:
                numel = stack.params[0].numel()
                grid = (len(stack.params), -(-numel // 2048))
                _kernels().move[grid](self._rows[stack], deltas[stack], scale, numel, **self._layout(stack), TILE=2048)
                moved.append(stack)
        return moved

    def _direction(
        self,
        stack: Stack,
        metric: Tensor,
        factor: Factor,
        gram: Tensor,
        square: Tensor,
        cross: Tensor,
        slope: Tensor,
        live: Tensor,
    ) -> Tensor:
        t, group, is_a = stack.tensors, stack.group, stack.rank_dim == -2
        delta = torch.empty_like(t["exp_avg"])
        rank, wide = delta.shape[1:] if is_a else delta.shape[:0:-1]
        room = padded_rank(rank)
        tile, warps = TILES[room]
        beta1, beta2 = map(float, group["betas"])
        lr = group["lr"] if isinstance(group["lr"], Tensor) and group["lr"].is_cuda else float(group["lr"])
        _kernels().find_direction[square.shape](
            self._rows[stack], t["exp_avg"], t["exp_avg_sq"], delta, t["basis"], metric, factor.tensors[0], gram,
            square, cross, slope, t["step"], live, lr, 1 - beta1, beta2, 1 - beta2, _log2(beta1), _log2(beta2),
            group["eps"], group["weight_decay"],
            rank, wide, wide if is_a else 1, 1 if is_a else rank,
            IS_A=is_a, LR_IS_TENSOR=isinstance(lr, Tensor), MAXIMIZE=group["maximize"], RANK=room, TILE=tile,
            num_warps=warps, num_stages=1, **self._layout(stack),
        )  # fmt: skip
        return delta

    def _found(self) -> bool:
        """Copy the addresses of parameters and gradients to the device; return False if the kernels cannot use them.

        The addresses may change from one step to the next.
        """
        addresses: list[int] = []
        device = self._table.get_device()
        for stack in self.stacks:
            dtype = stack.params[0].dtype
            for p in stack.params:
                g = p.grad
                if g is None or g.layout is not torch.strided or not g.is_contiguous() or not p.is_contiguous():
                    return False
                if g.dtype is not dtype or p.dtype is not dtype or g.get_device() != device or p.get_device() != device:
                    return False
                addresses += (p.data_ptr(), g.data_ptr())
        if addresses != self._addresses:
            new = torch.tensor(addresses, device="cpu").view(-1, 2)
            self._addresses, self._aligned = addresses, not (new & 15).any()
            self._table.copy_(new.pin_memory() if self._table.is_cuda else new, non_blocking=True)
        return True

    def _layout(self, stack: Stack) -> dict[str, Any]:
        dtype = str(stack.params[0].dtype).removeprefix("torch.")
        return {"DTYPE": getattr(_kernels().tl, dtype), "ALIGNED": self._aligned}

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """Return a context that launches on this device and disables the kernels after the first failure.

        Kernels fail at compilation or launch, so that a failed kernel has changed nothing.
        """
        global _broken
        try:
            with torch.cuda.device_of(self._table):  # type: ignore[no-untyped-call]
                yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _broken = True
            warnings.warn(
                f"CTROptimizer's Triton kernels failed ({type(error).__name__}: {error}). Torch operations now compute "
                "the same steps, a few milliseconds slower. Pass foreach=True to use torch operations from the start.",
                stacklevel=users_line(),
            )


def _live(stack: Stack, finite: Tensor) -> Tensor:
    """Return ``(L,)`` of 1 if ``finite``, else 0: ``Stack.live`` for a stack whose parameters all have gradients."""
    live = finite.to(stack.tensors["step"])
    return live.repeat(len(stack.params))


def _log2(x: float) -> float:
    return math.log2(x) if x > 0 else -math.inf
