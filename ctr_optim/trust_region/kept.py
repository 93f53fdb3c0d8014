"""One training forward pass of the model: its inputs, its logits, and the tokens that are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ctr_optim.runtime import distributed
from ctr_optim.trust_region.logits import NO_LOGITS, Logits, are_log_probabilities, evenly, stride_of
from ctr_optim.trust_region.loss_tokens import Watch, from_labels, named_inputs, shifts_labels
from ctr_optim.trust_region.rerun import Generators, generators, sequences_in, take, versions

# Loss tokens in a slice. On base5m (E2E, 58 steps) the KL of the batch over that of n neighbouring loss tokens has its
# 95 % point at 206 (n = 2), 4.2 (8), 2.1 (32), 1.9 (64), 1.4 (128), 1.2 (256).
LEAST_TOKENS = 128

_FOR_THE_LOSS = ("labels", "shift_labels", "fused_lm_head", "skip_logits")

SKIPS_HEAD = "_skip_lm_head"  # torchtitan: the forward ends before the last layer

_NO_MASK = "the loss has no gradient at the model's logits, and no labels say which tokens it looks at"
_NO_SOFTMAX = "the model's output is not called logits, and the loss takes no softmax of it"


@dataclass
class Kept:
    """One training forward of the outermost module.

    Attributes:
        module: the outermost module.
        args, kwargs: copies of the inputs of the first ``sequences``.
        batch: sequences of the whole batch; None where the inputs cannot be cut, and all of them are kept.
        sequences: sequences that a re-run takes; 0 where the inputs cannot be cut.
        source: the user's own inputs of the whole batch, and their versions.
        autocast: device, dtype and whether it is on; None where the device knows none.
        before: random generators before the forward.
        logits: ``(n, V)`` rows of the training's own logits; None where a re-run would not give the same.
        phase: turns which rows are looked at.
        watches: hooks on the logits of the outermost module (first) and of modules within.
        mask: ``(sequences, ...)`` of the whole batch, which tokens the loss looks at; None until :meth:`prepare`.
        rows: which rows of a re-run's flat logits are compared.
        fused: whether the training's forward gave its loss alone.
        columns: positions whose logits a re-run of such a model is asked for; None: all.
        headless: whether the forward left the last layer to the loss, as torchtitan's does for a loss in chunks.
        units: rows of the logits' first dimension for each sequence; 0 where there is no whole number of them.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int | None
    sequences: int
    source: tuple[Any, list[int]] | None
    autocast: tuple[str, torch.dtype, bool] | None
    before: Generators | None
    phase: int
    logits: Tensor | None = None
    watches: list[Watch] = field(default_factory=list)
    mask: Tensor | None = None
    rows: slice | Tensor = field(default_factory=lambda: slice(None))
    fused: bool = False
    columns: Tensor | None = None
    headless: bool = False
    units: int = 1

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], share: float, phase: int) -> Kept:
        """Keep a share of a batch, or all of it where ``share`` is 1 or the inputs cannot be cut.

        Raises:
            CannotRerun: where the inputs cannot be used twice.
        """
        batch = sequences_in(args, kwargs) if share < 1 else None
        keep = 0 if batch is None else max(1, int(batch * share))
        kept_args, kept_kwargs = take((args, kwargs), keep or None)
        whole = batch is None or torch.compiler.is_compiling()  # a graph cannot ask for versions
        source = None if whole else ((args, kwargs), versions((args, kwargs)))
        device = next((p.device.type for p in module.parameters()), "cpu")
        autocast = None
        if torch.amp.is_autocast_available(device):
            autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        kept = cls(module, kept_args, kept_kwargs, batch, keep, source, autocast, generators(), phase)
        kept.headless = getattr(module, SKIPS_HEAD, False) is True
        return kept

    @cached_property
    def norms(self) -> list[nn.Module]:
        """Modules that take statistics of the batch."""
        return [m for m in self.module.modules() if isinstance(m, _NormBase) and m.training]

    @cached_property
    def fsdp(self) -> list[Any]:
        """Modules that FSDP2 wraps."""
        return distributed.fsdp_modules([self.module])

    # -- after the forward ----------------------------------------------------------------------------------------

    def said(self, logits: Logits) -> None:
        """Keep what the training's forward said, and watch the gradient there."""
        whole = logits.whole().detach()
        if self.batch is not None:
            # a model may give the logits of all sequences' tokens in one dimension
            self.units, rest = divmod(whole.shape[0], self.batch)
            if rest or not self.units:
                self.units = 0
        self.watches.insert(0, Watch(logits))
        # chance, and statistics of the whole batch, would say something else the next time
        if not self.headless and self.before is not None and self.before.unmoved() and not self.norms and self.units:
            rows = self._cut(whole).flatten(0, -2)
            self.rows = evenly(len(rows), self.phase)
            self.logits = rows[self.rows].clone()
        elif self.batch is not None:  # two passes of half the sequences cost what one of all would
            self.resize(max(1, self.sequences // 2))
        self.before = None

    def said_nothing(self) -> bool:
        """Prepare to run without labels, for a model that gives its loss or its logits; False where it got none.

        Liger's forwards and TRL's fuse the last layer with the loss, so that no logits take up memory. The labels tell
        which tokens the loss looks at.
        """
        inputs = named_inputs(*self._all())
        if from_labels(inputs, shifts_labels(self.module)) is None or (
            self.args[:1] and isinstance(self.args[0], dict)
        ):
            return False
        self.fused, self.before = True, None
        if self.batch is not None:
            self.resize(max(1, self.sequences // 2))
        return True

    # -- after the backward ---------------------------------------------------------------------------------------

    def prepare(self) -> str | None:
        """Decide which tokens are compared, once; the reason where none can be."""
        if self.mask is not None:
            return None
        mask = self._mask()
        if mask is None:
            return NO_LOGITS if self.fused else _NO_MASK
        if not self.fused and not self._trusted():
            return _NO_SOFTMAX
        self.mask = mask
        if self.batch is not None and (not self.units or len(mask) != self.batch * self.units):
            self.widen()
        elif self.batch is not None:
            self._enlarge()
        self._choose_rows()
        return None

    def widen(self) -> bool:
        """Take the whole batch instead of a slice; False where it is taken already, or was changed in place since."""
        if self.batch is None or self.source is None:
            return False
        inputs, seen = self.source
        if versions(inputs) != seen:
            return False
        self.args, self.kwargs = take(inputs, None)
        self.batch, self.sequences, self.source, self.logits = None, 0, None, None
        self._choose_rows()
        return True

    def resize(self, sequences: int) -> bool:
        """Take another number of sequences; False where the batch was changed in place since."""
        inputs: Any = (self.args, self.kwargs)
        if sequences > self.sequences:
            if self.source is None or versions(self.source[0]) != self.source[1]:
                return False
            inputs = self.source[0]
        self.args, self.kwargs = take(inputs, sequences)
        self.sequences, self.logits = sequences, None
        return True

    def loss_tokens(self) -> Tensor:
        """``(n,)`` whether the loss looks at each of the rows that are compared."""
        return self._looked_at().flatten()[self.rows]

    def compared(self, logits: Tensor) -> Tensor | None:
        """``(n, V)`` rows of a re-run's logits; None where their shape is not the training's."""
        rows = logits.flatten(0, -2)
        return rows[self.rows] if len(rows) == self._looked_at().numel() else None

    def inputs_for_logits(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of a re-run that gives logits."""
        if not self.fused:
            return self.args, self.kwargs
        kwargs = {name: value for name, value in self.kwargs.items() if name not in _FOR_THE_LOSS}
        if self.columns is not None:
            kwargs["logits_to_keep"] = self.columns
        return self.args, kwargs

    # -- parts ----------------------------------------------------------------------------------------------------

    def _all(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs: tuple[tuple[Any, ...], dict[str, Any]] = (
            (self.args, self.kwargs) if self.source is None else self.source[0]
        )
        return inputs

    def _cut(self, whole: Tensor) -> Tensor:
        return whole if self.batch is None else whole[: self.sequences * self.units]

    def _looked_at(self) -> Tensor:
        assert self.mask is not None
        mask = self._cut(self.mask)
        return mask if self.columns is None else mask[:, self.columns]

    def _mask(self) -> Tensor | None:
        inputs = named_inputs(*self._all())
        if self.fused:
            return from_labels(inputs, shifts_labels(self.module))
        if not self.watches:
            return None
        outer = self.watches[0]
        for watch in self.watches:  # DistributedDataParallel and wrappers may hand out copies that nobody uses
            if watch.shape == outer.shape and watch.classes == outer.classes and watch.mask is not None:
                return watch.mask
        return from_labels(inputs, shifts_labels(self.module), outer.shape)

    def _trusted(self) -> bool:
        if (
            self.headless
            or self.watches[0].classes == 1
            or any(watch.named or watch.feeds_softmax() for watch in self.watches)
        ):
            return True
        return self.logits is not None and bool(are_log_probabilities(self.logits))

    def _enlarge(self) -> None:
        """Take as many sequences as hold enough loss tokens: a KL over a few tokens is mostly noise."""
        assert self.mask is not None and self.batch is not None
        tokens = self.mask.reshape(self.batch, -1).sum(1).cumsum(0).tolist()
        least = LEAST_TOKENS / distributed.world_size()  # all processes' tokens are averaged
        if tokens[self.sequences - 1] < least:
            self.resize(next((i + 1 for i, n in enumerate(tokens) if n >= least), self.batch))

    def _choose_rows(self) -> None:
        """Compare rows that the loss looks at, if there are too many rows to compare all."""
        assert self.mask is not None
        mask = self._cut(self.mask)
        if self.fused:
            self.columns = None
            if self._passes_on("logits_to_keep"):
                columns = mask.any(0).nonzero().squeeze(-1)
                self.columns = columns[:: stride_of(len(columns) * len(mask))]
            return
        flat = mask.flatten()
        if self.logits is not None:
            if self.rows == slice(0, None, 1) or int(flat[self.rows].sum()) >= min(LEAST_TOKENS, int(flat.sum())):
                return
            self.logits = None
        looked_at = flat.nonzero().squeeze(-1)
        self.rows = looked_at[evenly(len(looked_at), self.phase)] if stride_of(len(flat)) > 1 else slice(None)

    def _passes_on(self, name: str) -> bool:
        """Whether the forward takes an argument, or takes any and a module within takes this one."""
        outer = signature(type(self.module).forward).parameters
        if name not in outer and not any(p.kind is p.VAR_KEYWORD for p in outer.values()):
            return False
        return any(name in signature(type(m).forward).parameters for m in self.module.modules())
