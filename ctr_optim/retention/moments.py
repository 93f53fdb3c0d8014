"""Hooks that sum the inputs of LoRA layers: the Gram matrix of a layer, or a sketch of it for a wide layer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.model.pair import LoRAPair
from ctr_optim.runtime import distributed
from ctr_optim.runtime.devices import exact
from ctr_optim.runtime.hooks import Hook

EXACT_WIDTH = 1024  # largest number of input features for which the Gram matrix is always stored whole
EXACT_BYTES = 256 * 2**20  # if the Gram matrices of all layers need no more memory, all are stored whole
OVERSAMPLED = 8  # a sketch has twice the rank plus this number of columns
_PRINT = 256  # number of entries by which two inputs are compared


class Sum:
    """The Gram matrix ``sum_t x_t x_t^T`` over tokens, stored whole or as a Nystrom sketch.

    Args:
        width: d, the number of input features.
        columns: n, the number of columns of the sketch; None to store the whole matrix.
        device: device of the sums.
        dtype: dtype of ``product``.

    Attributes:
        test: random test matrix ``(d, n)``; None for a whole matrix.
        product: the Gram matrix times ``test``, ``(d, n)``, or the whole Gram matrix ``(d, d)``.
        trace: ``()`` trace of the Gram matrix, exact also for a sketch.
        tokens: ``()`` number of tokens.
    """

    def __init__(self, width: int, columns: int | None, device: torch.device, dtype: torch.dtype) -> None:
        self.width = width
        self.test: Tensor | None = None
        if columns is not None and columns < width:
            generator = torch.Generator().manual_seed(width)  # the same in every process and run
            self.test = torch.randn(width, columns, generator=generator, device="cpu").to(device, dtype)
        self.product = torch.zeros(width, width if self.test is None else self.test.shape[1]).to(device, dtype)
        self.trace, self.tokens = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))

    def add(self, rows: Tensor) -> None:
        """Add tokens ``(n, d)``."""
        with exact([rows.device]):
            rows = rows.to(self.product.dtype)
            self.product += rows.mT @ (rows if self.test is None else rows @ self.test)
            self.trace += rows.square().sum(dtype=torch.float64)
            self.tokens += rows.shape[0]

    def eigenpairs(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the ``rank`` largest eigenvalues ``(k,)`` in descending order, and their eigenvectors ``(d, k)``."""
        with exact([self.product.device]):
            if self.test is None:
                values, vectors = torch.linalg.eigh(0.5 * (self.product + self.product.mT))
                return values.flip(-1)[:rank].clamp_min(0), vectors.flip(-1)[:, :rank].contiguous()
            return _nystrom(self.product, self.test, rank)


def _nystrom(sketch: Tensor, test: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return eigenpairs of ``Y (Omega^T Y)^+ Y^T`` (Tropp et al., 2017, arXiv 1706.05736), computed in float64."""
    dtype = sketch.dtype
    sketch, test = sketch.double(), test.double()
    inner = test.mT @ sketch
    values, turn = torch.linalg.eigh(0.5 * (inner + inner.mT))
    floor = values[-1].clamp_min(torch.finfo(values.dtype).tiny) * len(values) * torch.finfo(dtype).eps
    roots = torch.where(values > floor, values.clamp_min(floor).rsqrt(), 0)  # drop directions of pure rounding error
    vectors, singular, _ = torch.linalg.svd(sketch @ (turn * roots), full_matrices=False)
    return singular[:rank].square().to(dtype), vectors[:, :rank].to(dtype).contiguous()


class Moments:
    """Context manager that adds hooks to the LoRA layers of a model and sums their inputs.

    Layers with the same input (such as query, key and value) share one sum. The first forward pass of a layer decides
    this. The LoRA layers' inputs must be the same tensor. A library may cast this tensor separately for each layer, so
    the inputs of their A modules are compared by entries.

    Args:
        pairs: the LoRA layers.
        rank: k, the number of eigenpairs that will be computed.
    """

    def __init__(self, pairs: Sequence[LoRAPair], rank: int) -> None:
        self._pairs, self._handles = list(pairs), []  # type: list[LoRAPair], list[Any]
        whole = 4 * sum(pair.A.shape[1] ** 2 for pair in pairs) <= EXACT_BYTES
        self._columns = [None if whole or pair.A.shape[1] <= EXACT_WIDTH else 2 * rank + OVERSAMPLED for pair in pairs]
        self._leader: dict[int, int] = {}
        self._sums: dict[int, Sum] = {}
        self._inputs: dict[int, Tensor] = {}  # by layer: input of a LoRA layer whose forward pass is running
        self._read: dict[int, tuple[Any, int, Tensor]] = {}  # by id(input): weak reference, first layer, entries
        self._mask: Tensor | None = None
        self._counts = True

    def __enter__(self) -> Moments:
        for index, pair in enumerate(self._pairs):
            for module, act in ((pair.layer, self._entered), (pair.down, self._reached)):
                hook = Hook(partial(act, index), id(module))
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._inputs.clear()
        self._read.clear()

    def begin(self, mask: Tensor | None, counts: bool = True) -> None:
        """Prepare for a forward pass.

        Args:
            mask: ``(B, T)`` which tokens count; None if all do.
            counts: False to ignore the whole pass.
        """
        self._mask, self._counts = mask, counts
        self._inputs.clear()
        self._read.clear()

    def summed(self) -> tuple[dict[str, str], dict[str, Sum]]:
        """Return the sums over all processes.

        Returns:
            for each layer that any token has reached, the name of its sum; and the sums by name.
        """
        leaders: dict[int, int] = {}
        for found in reversed(distributed.of_all(self._leader)):
            leaders.update(found)
        needed = sorted({leader for found in distributed.of_all(self._leader) for leader in found.values()})
        for leader in needed:  # In this process, a layer may have had no tokens, such as an expert of a mixture.
            if leader not in self._sums:
                self._sums[leader] = self._new(leader, self._pairs[leader].A)
        sums = [self._sums[leader] for leader in needed]
        distributed.add_up([t for total in sums for t in (total.product, total.trace, total.tokens)])
        name = [pair.name for pair in self._pairs]
        return {name[i]: name[j] for i, j in sorted(leaders.items())}, {name[j]: self._sums[j] for j in needed}

    def _new(self, index: int, like: Tensor) -> Sum:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return Sum(self._pairs[index].A.shape[1], self._columns[index], like.device, dtype)

    def _entered(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _first(args, kwargs)
        if x is not None:
            self._inputs[index] = x

    def _reached(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _first(args, kwargs)
        source = self._inputs.pop(index, x)
        if x is None or source is None:
            return
        leader = self._leader.get(index)
        if leader is None:
            leader = self._leader[index] = self._leader_of(index, x, source)
        if leader != index or not self._counts:
            return
        if index not in self._sums:
            self._sums[index] = self._new(index, x)
        self._sums[index].add(self._rows(x))

    def _leader_of(self, index: int, x: Tensor, source: Tensor) -> int:
        entries = x.detach().flatten()
        entries = entries[:: max(1, len(entries) // _PRINT)].clone()
        alive, leader, theirs = self._read.get(id(source), (None, index, entries))
        same = alive is not None and alive() is source
        if same and theirs.shape == entries.shape and bool((theirs == entries).all()):
            return leader
        if not same:
            self._read[id(source)] = weakref.ref(source), index, entries
        return index

    def _rows(self, x: Tensor) -> Tensor:
        """Return the tokens ``(n, d)`` of an input ``(..., d)``, without padding."""
        rows, mask = x.detach().flatten(0, -2), self._mask
        if mask is None or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
            return rows
        return rows[mask.flatten().to(rows.device)]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the first floating-point tensor among a module's arguments."""
    return next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()), None)
