"""Second moments of every layer's input over retained text, in low-rank form."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.model.registry import find_pairs
from ctr_optim.retention.metric import DAMPING, POWER, RANK, Metric, metric_of
from ctr_optim.retention.moments import Moments
from ctr_optim.retention.passes import batches_of, mask_of, run, untouched
from ctr_optim.retention.progress import progress
from ctr_optim.runtime import distributed
from ctr_optim.runtime.messages import users_line

LEAST_TOKENS = 4  # for each eigenpair that is kept; eigenvectors of fewer tokens are noise


@dataclass(frozen=True, eq=False)
class Statistics:
    """The second moment of one layer's input: ``U diag(values) U^T``, and ``rest`` in every direction beyond U.

    Attributes:
        values: k largest eigenvalues, ``(k,)``, falling.
        vectors: U, ``(d, k)``, orthonormal columns.
        rest: mean of the other d - k eigenvalues, ``()``.
        tokens: number of tokens that were seen.
    """

    values: Tensor
    vectors: Tensor
    rest: Tensor
    tokens: int

    @property
    def width(self) -> int:
        """d, the layer's input features."""
        return self.vectors.shape[0]

    def merged(self, other: Statistics) -> Statistics:
        """Return the second moment over the tokens of both, cut to the larger k of the two; exact but for the cut."""
        mine = self.tokens / max(self.tokens + other.tokens, 1)
        parts, rank = ((mine, self), (1 - mine, other)), max(len(self.values), len(other.values))
        basis, _ = torch.linalg.qr(torch.cat([s.vectors for _, s in parts], 1))
        inner = sum(share * s._within(basis) for share, s in parts)
        values, turn = torch.linalg.eigh(0.5 * (inner + inner.mT))  # type: ignore[union-attr,operator]
        values, vectors = values.flip(-1)[:rank].clamp_min(0), (basis @ turn).flip(-1)[:, :rank]
        trace = sum(share * (s.values.sum() + (s.width - len(s.values)) * s.rest) for share, s in parts)
        return Statistics(values, vectors, rest_of(trace, values, self.width), self.tokens + other.tokens)

    def _within(self, basis: Tensor) -> Tensor:
        """The matrix on the columns of an orthonormal basis."""
        inside = basis.mT @ self.vectors
        eye = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
        return self.rest * eye + (inside * (self.values - self.rest)) @ inside.mT


class Retention:
    """What a model's layers read on text whose predictions should stay: low-rank second moments, by layer.

    Made by :meth:`measure`, or empty for :meth:`load_state_dict`.

    Attributes:
        rank: eigenpairs kept for each layer; fewer for layers of fewer input features.
        layers: for each layer's name, the name under which its statistics are held: layers that read one input share
            them.
        statistics: by those names.
    """

    def __init__(
        self,
        rank: int = RANK,
        layers: Mapping[str, str] | None = None,
        statistics: Mapping[str, Statistics] | None = None,
    ) -> None:
        self.rank, self.layers, self.statistics = rank, dict(layers or {}), dict(statistics or {})

    @staticmethod
    def measure(model: nn.Module, batches: Iterable[Any], rank: int = RANK) -> Retention:
        """Measure a model on retained text: one forward pass a batch, without gradients and without a trace.

        Some 16000 tokens serve well. Under several processes each may bring batches of its own: sums go over all.

        Args:
            model: with LoRA layers, of any library.
            batches: dicts for ``model(**batch)``, whose labels are left out and whose ``attention_mask`` tells padding,
                or tensors of token ids ``(B, T)`` without padding.
            rank: k, eigenpairs to keep of each layer.

        Raises:
            TypeError: if a batch is neither a dict nor a tensor of token ids.
            ValueError: if there are no LoRA layers, no batches, too few tokens for ``rank``, ids outside of the
                vocabulary, or inputs that are not finite.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"Retention.measure: rank is {rank!r}, expected a whole number of at least 1")
        pairs = find_pairs(model)
        if not pairs:
            raise ValueError("Retention.measure: the model has no LoRA layers; add the adapter first")
        found, trouble = [], None
        try:
            found = batches_of(batches, model, "retain")
        except (TypeError, ValueError) as error:
            trouble = error
        _agree_on(trouble)
        # every process runs equally many passes, for a sharded model's passes communicate
        passes = max(distributed.of_all(len(found)))
        with untouched(model), Moments(pairs, rank) as moments:
            for index in progress(passes, "measuring retained text"):
                batch = found[min(index, len(found) - 1)]
                moments.begin(mask_of(batch), counts=index < len(found))
                run(model, batch)
        layers, sums = moments.summed()
        layers = {plain_name(name): plain_name(source) for name, source in layers.items()}
        sums = {plain_name(name): total for name, total in sums.items()}
        return _retention(rank, layers, sums, [plain_name(pair.name) for pair in pairs])

    def metric_for(self, name: str, power: float = POWER, damping: float = DAMPING) -> Metric | None:
        """Return the whitener P of one layer; None for a layer that no retained token reached.

        Args:
            name: the layer's name, as in ``opt.pairs``.
            power, damping: p and eps, see :mod:`ctr_optim.retention.metric`.
        """
        source = self.layers.get(plain_name(name))
        if source is None:
            return None
        s = self.statistics[source]
        return metric_of(s.values, s.vectors, s.rest, power, damping)

    def merge(self, other: Retention) -> Retention:
        """Return the statistics over the tokens of both; a layer that one of them lacks has the other's.

        Raises:
            ValueError: if a layer has another width in the other: it was measured on another model.
        """
        layers: dict[str, str] = {}
        statistics: dict[str, Statistics] = {}
        made: dict[tuple[str | None, str | None], str] = {}
        for name in [*self.layers, *(name for name in other.layers if name not in self.layers)]:
            sources = self.layers.get(name), other.layers.get(name)
            if sources not in made:
                made[sources] = name
                parts = [r.statistics[s] for r, s in zip((self, other), sources, strict=True) if s is not None]
                if len({part.width for part in parts}) > 1:
                    raise ValueError(
                        f"Retention.merge: {name} has {parts[0].width} input features here and {parts[1].width} in the "
                        "other; merge what was measured on one model"
                    )
                statistics[name] = parts[0].merged(parts[1]) if len(parts) == 2 else parts[0]
            layers[name] = made[sources]
        return Retention(max(self.rank, other.rank), layers, statistics)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and names only, fit for ``torch.load(..., weights_only=True)``."""
        entries = {name: {**vars(s)} for name, s in self.statistics.items()}
        return {"rank": self.rank, "layers": dict(self.layers), "statistics": entries}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned.

        Raises:
            ValueError: if something is missing in it, or of the wrong shape.
        """
        try:
            statistics = {name: Statistics(**entry) for name, entry in state["statistics"].items()}
            rank, layers = int(state["rank"]), dict(state["layers"])
            right = all(source in statistics for source in layers.values()) and all(
                s.vectors.dim() == 2 and s.values.shape == s.vectors.shape[1:] and s.rest.dim() == 0
                for s in statistics.values()
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Retention: expected what state_dict() returned ({error!r})") from None
        if not right:
            raise ValueError("Retention: expected what state_dict() returned; tensors or names do not fit together")
        self.rank, self.layers, self.statistics = rank, layers, statistics


def plain_name(name: str) -> str:
    """Return a layer's name without what DistributedDataParallel and torch.compile put before it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def rest_of(trace: Any, values: Tensor, width: int) -> Tensor:
    """Return ``()`` the mean of the eigenvalues beyond the largest, from the trace of all."""
    others = width - len(values)
    return ((trace - values.sum()) / others).clamp_min(0) if others else torch.zeros_like(values.sum())


def _retention(rank: int, layers: Mapping[str, str], sums: Mapping[str, Any], names: list[str]) -> Retention:
    statistics: dict[str, Statistics] = {}
    few: dict[str, int] = {}
    for name, total in sums.items():
        tokens, trace = int(total.tokens), float(total.trace)
        if trace - trace != 0:
            raise ValueError(
                f"retain: the input of {name} is not finite on retained text; look for broken rows, or for a model "
                "that overflows in half precision"
            )
        kept = min(rank, total.width)
        if tokens < LEAST_TOKENS * kept:
            few[name] = tokens
            continue
        values, vectors = total.eigenpairs(kept)
        values, trace = values / tokens, total.trace.to(values) / tokens
        statistics[name] = Statistics(values, vectors, rest_of(trace, values, total.width), tokens)
    if not statistics:
        most = max(few.values(), default=0)
        raise ValueError(
            f"retain: got {most} tokens, and rank={rank} needs at least {LEAST_TOKENS * rank}; pass more text (some "
            "16000 tokens serve well), or a smaller rank"
        )
    kept_layers = {name: source for name, source in layers.items() if source in statistics}
    blind = [name for name in names if name not in kept_layers]
    if blind:
        warnings.warn(
            f"retain: no retained text, or too little, reached {len(blind)} of {len(names)} LoRA layers "
            f"({blind[0]}, ...): they train as without retention. Retained text must pass through the layers as "
            "modules: fused kernels that read the weights alone hide it.",
            stacklevel=users_line(),
        )
    return Retention(rank, kept_layers, statistics)


def _agree_on(trouble: Exception | None) -> None:
    """Raise in every process what one of them found, so that none waits for the others."""
    troubles = [t for t in distributed.of_all(trouble) if t is not None]
    if troubles:
        raise trouble or troubles[0]
