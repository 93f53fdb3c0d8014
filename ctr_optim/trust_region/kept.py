"""One stored training forward pass: its inputs, its logits, and the tokens to compare."""

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
from ctr_optim.trust_region.others import MOST_OTHERS, outside_the_loss
from ctr_optim.trust_region.rerun import Generators, generators, sequences_in, take, versions

# Smallest number of loss tokens in a slice. On base5m (E2E, 58 steps), the 95th percentile of the ratio of the batch's
# KL to the KL of n neighbouring loss tokens is 206 (n = 2), 4.2 (8), 2.1 (32), 1.9 (64), 1.4 (128), 1.2 (256).
LEAST_TOKENS = 128

_FOR_THE_LOSS = ("labels", "shift_labels", "fused_lm_head", "skip_logits")

SKIPS_HEAD = "_skip_lm_head"  # torchtitan: the forward pass ends before the last layer

_NO_MASK = "the loss has no gradient at the model's logits, and no labels show which tokens it uses"
_NO_SOFTMAX = "the model's output is not named logits, and the loss takes no softmax of it"


@dataclass
class Kept:
    """Record of one training forward pass of the outermost module.

    Attributes:
        module: the outermost module.
        args, kwargs: copies of the inputs, cut to the first ``sequences`` if possible.
        batch: number of sequences in the batch; None if all inputs are stored because they cannot be cut.
        sequences: number of sequences in a re-run; 0 if all inputs are stored.
        source: the user's own inputs of the whole batch, and their version counters; None if all inputs are stored.
        autocast: device type, dtype and whether autocast is on; None if the device type has no autocast.
        before: random generators before the forward pass; None in a compiled graph, and after the forward pass.
        logits: ``(n, V)`` compared rows of the training's own logits; None if a re-run may give different ones.
        phase: offset of the sampled rows.
        watches: hooks on the logits, first those of the outermost module, then those of submodules.
        mask: ``(sequences, ...)`` which tokens of the batch the loss uses; None until :meth:`prepare`.
        rows: indices of the compared rows in a re-run's flattened logits.
        fused: whether the training's forward pass returned only the loss.
        columns: token positions for which a re-run of such a model computes logits; None: all.
        headless: whether the forward pass left the last layer to the loss, as torchtitan's does for a chunked loss.
        units: entries of the logits' first dimension per sequence; 0 if that is not a whole number.
        with_others: whether to compare tokens outside the loss too.
        others: like ``mask``, which tokens outside the loss to compare; None if unknown or without ``with_others``.
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
    with_others: bool = False
    others: Tensor | None = None

    @classmethod
    def of(
        cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], share: float, phase: int,
        with_others: bool = False,
    ) -> Kept:  # fmt: skip
        """Return a record of a share of the batch; of all of it if ``share`` is 1 or the inputs cannot be cut.

        Raises:
            CannotRerun: if the inputs cannot be copied.
        """
        batch = sequences_in(args, kwargs) if share < 1 else None
        keep = 0 if batch is None else max(1, int(batch * share))
        kept_args, kept_kwargs = take((args, kwargs), keep or None)
        whole = batch is None or torch.compiler.is_compiling()  # A compiled graph cannot read version counters.
        source = None if whole else ((args, kwargs), versions((args, kwargs)))
        device = next((p.device.type for p in module.parameters()), "cpu")
        autocast = None
        if torch.amp.is_autocast_available(device):
            autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        kept = cls(module, kept_args, kept_kwargs, batch, keep, source, autocast, generators(), phase)
        kept.with_others = with_others
        kept.headless = getattr(module, SKIPS_HEAD, False) is True
        return kept

    @cached_property
    def norms(self) -> list[nn.Module]:
        """Modules in training mode that normalise by statistics (BatchNorm, InstanceNorm)."""
        return [m for m in self.module.modules() if isinstance(m, _NormBase) and m.training]

    @cached_property
    def fsdp(self) -> list[Any]:
        """Modules that FSDP2 shards."""
        return distributed.fsdp_modules([self.module])

    # -- after the forward ----------------------------------------------------------------------------------------

    def said(self, logits: Logits) -> None:
        """Store the training's logits, and hook their gradient."""
        whole = logits.whole().detach()
        if self.batch is not None:
            # A model may flatten sequences and tokens into one dimension of its logits.
            self.units, rest = divmod(whole.shape[0], self.batch)
            if rest or not self.units:
                self.units = 0
        self.watches.insert(0, Watch(logits))
        # With dropout or batch statistics, a re-run of a slice gives different logits, so the training's are of no use.
        if not self.headless and self.before is not None and self.before.unmoved() and not self.norms and self.units:
            rows = self._cut(whole).flatten(0, -2)
            self.rows = evenly(len(rows), self.phase)
            self.logits = rows[self.rows].clone()
        elif self.batch is not None:  # Two passes are needed then; half the sequences keep the cost the same.
            self.resize(max(1, self.sequences // 2))
        self.before = None

    def said_nothing(self) -> bool:
        """Prepare re-runs without labels for a model that returned no logits; return False if it had no labels.

        Liger's and TRL's forward passes fuse the last layer with the loss, and store no logits. Without labels they
        return logits. The labels show which tokens the loss uses.
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
        """Choose the tokens to compare, once; return the reason if that is not possible, else None."""
        if self.mask is not None:
            return None
        mask = self._mask()
        if mask is None:
            return NO_LOGITS if self.fused else _NO_MASK
        if not self.fused and not self._trusted():
            return _NO_SOFTMAX
        self.mask = mask
        if self.with_others and shifts_labels(self.module):
            self.others = outside_the_loss(named_inputs(*self._all()), mask)
        if self.batch is not None and (not self.units or len(mask) != self.batch * self.units):
            self.widen()
        elif self.batch is not None:
            self._enlarge()
        self._choose_rows()
        return None

    def widen(self) -> bool:
        """Use the whole batch instead of a slice; return False if it is used already or was changed in place."""
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
        """Use another number of sequences; return False if more are needed and the batch was changed in place."""
        inputs: Any = (self.args, self.kwargs)
        if sequences > self.sequences:
            if self.source is None or versions(self.source[0]) != self.source[1]:
                return False
            inputs = self.source[0]
        self.args, self.kwargs = take(inputs, sequences)
        self.sequences, self.logits = sequences, None
        return True

    def loss_tokens(self) -> Tensor:
        """Return ``(n,)`` whether the loss uses each compared row."""
        return self._looked_at().flatten()[self.rows]

    def other_tokens(self) -> Tensor | None:
        """Return ``(n,)`` whether each compared row is outside the loss and no padding; None if that is unknown."""
        if self.others is None or self.columns is not None:
            return None
        return self._cut(self.others).flatten()[self.rows]

    def compared(self, logits: Tensor) -> Tensor | None:
        """Return ``(n, V)`` the compared rows of a re-run's logits; None if their shape is not the training's."""
        rows = logits.flatten(0, -2)
        return rows[self.rows] if len(rows) == self._looked_at().numel() else None

    def inputs_for_logits(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs of a re-run that returns logits: without labels if the training returned only the loss."""
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
        for watch in self.watches:  # DistributedDataParallel and wrappers may return copies that the loss does not use.
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
        """Use as many sequences as contain enough loss tokens: a KL over a few tokens is mostly noise."""
        assert self.mask is not None and self.batch is not None
        tokens = self.mask.reshape(self.batch, -1).sum(1).cumsum(0).tolist()
        least = LEAST_TOKENS / distributed.world_size()  # The measurement averages over all processes.
        if tokens[self.sequences - 1] < least:
            self.resize(next((i + 1 for i, n in enumerate(tokens) if n >= least), self.batch))

    def _choose_rows(self) -> None:
        """Choose the compared rows: all of them, or a sample of the loss tokens if there are too many."""
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
        if stride_of(len(flat)) == 1:
            self.rows = slice(None)
            return
        self.rows = looked_at[evenly(len(looked_at), self.phase)]
        if self.others is not None:
            others = self._cut(self.others).flatten().nonzero().squeeze(-1)
            self.rows = torch.cat([self.rows, others[:: max(1, -(-len(others) // MOST_OTHERS))]])

    def _passes_on(self, name: str) -> bool:
        """Return whether the forward pass, or through its ``**kwargs`` a submodule, accepts an argument."""
        outer = signature(type(self.module).forward).parameters
        if name not in outer and not any(p.kind is p.VAR_KEYWORD for p in outer.values()):
            return False
        return any(name in signature(type(m).forward).parameters for m in self.module.modules())
