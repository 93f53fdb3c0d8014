"""Second moments of each LoRA layer's input over retained text, in low-rank form."""

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

LEAST_TOKENS = 4  # per kept eigenpair; eigenvectors of fewer tokens are mostly noise


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moment of one layer's input: ``U diag(values) U^T + rest (I - U U^T)``.

    Attributes:
        values: the k largest eigenvalues, ``(k,)``, in descending order.
        vectors: U, ``(d, k)``, orthonormal columns.
        rest: mean of the other d - k eigenvalues, ``()``.
        tokens: number of measured tokens.
    """

    values: Tensor
    vectors: Tensor
    rest: Tensor
    tokens: int

    @property
    def width(self) -> int:
        """d, the number of the layer's input features."""
        return self.vectors.shape[0]

    def merged(self, other: Statistics) -> Statistics:
        """Return the second moment over the tokens of both, truncated to the larger k of the two."""
        mine = self.tokens / max(self.tokens + other.tokens, 1)
        parts, rank = ((mine, self), (1 - mine, other)), max(len(self.values), len(other.values))
        basis, _ = torch.linalg.qr(torch.cat([s.vectors for _, s in parts], 1))
        inner = sum(share * s._within(basis) for share, s in parts)
        values, turn = torch.linalg.eigh(0.5 * (inner + inner.mT))  # type: ignore[union-attr,operator]
        values, vectors = values.flip(-1)[:rank].clamp_min(0), (basis @ turn).flip(-1)[:, :rank]
        trace = sum(share * (s.values.sum() + (s.width - len(s.values)) * s.rest) for share, s in parts)
        return Statistics(values, vectors, rest_of(trace, values, self.width), self.tokens + other.tokens)

    def _within(self, basis: Tensor) -> Tensor:
        """Return the second moment in an orthonormal basis ``(d, n)``, as an ``(n, n)`` matrix."""
        inside = basis.mT @ self.vectors
        eye = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
        return self.rest * eye + (inside * (self.values - self.rest)) @ inside.mT


class Retention:
    """Statistics of retained text on a model: the low-rank second moment of each LoRA layer's input.

    Create it with :meth:`measure`, or create an empty one for :meth:`load_state_dict`.

    Attributes:
        rank: largest number of eigenpairs per layer.
        layers: maps each layer's name to the name of its statistics; layers with the same input share statistics.
        statistics: the statistics, by these names.
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
        """Measure the statistics of retained text, with one forward pass per batch and without gradients.

        About 16000 tokens are enough. Each of several processes may pass its own batches; the statistics cover all
        batches. The model is unchanged afterwards.

        Args:
            model: a model with LoRA layers of any supported library.
            batches: dicts for ``model(**batch)``, or tensors of token ids ``(B, T)`` without padding. In a dict, labels
                are ignored and ``attention_mask`` marks padding.
            rank: k, the number of eigenpairs to keep per layer.

        Returns:
            the statistics.

        Raises:
            TypeError: if a batch is neither a dict nor a tensor of token ids.
            ValueError: if there are no LoRA layers, no batches or too few tokens for ``rank``, or if token ids are
                outside of the vocabulary or inputs are not finite.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"Retention.measure: rank is {rank!r}, expected a whole number of at least 1")
        pairs = find_pairs(model)
        if not pairs:
            raise ValueError("Retention.measure: the model has no LoRA layers; add the adapter to the model first")
        found, trouble = [], None
        try:
            found = batches_of(batches, model, "retain")
        except (TypeError, ValueError) as error:
            trouble = error
        _agree_on(trouble)
        # All processes need the same number of passes, because the passes of a sharded model communicate.
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
        """Return the whitener P of one layer; None if the layer has no statistics.

        Args:
            name: the layer's name, as in ``opt.pairs``.
            power: p, see :mod:`ctr_optim.retention.metric`.
            damping: eps, see :mod:`ctr_optim.retention.metric`.
        """
        source = self.layers.get(plain_name(name))
        if source is None:
            return None
        s = self.statistics[source]
        return metric_of(s.values, s.vectors, s.rest, power, damping)

    def merge(self, other: Retention) -> Retention:
        """Return the statistics over the tokens of both; a layer that only one of them has keeps its statistics.

        Args:
            other: statistics of the same model on other text.

        Raises:
            ValueError: if a layer's numbers of input features differ, so the models differ.
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
                        "other; merge only statistics of one model"
                    )
                statistics[name] = parts[0].merged(parts[1]) if len(parts) == 2 else parts[0]
            layers[name] = made[sources]
        return Retention(max(self.rank, other.rank), layers, statistics)

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as tensors, numbers and names; ``torch.load(..., weights_only=True)`` can read them."""
        entries = {name: {**vars(s)} for name, s in self.statistics.items()}
        return {"rank": self.rank, "layers": dict(self.layers), "statistics": entries}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a result of :meth:`state_dict`.

        Raises:
            ValueError: if an entry is missing or has the wrong type or shape.
        """
        try:
            statistics = {name: Statistics(**entry) for name, entry in state["statistics"].items()}
            rank, layers = int(state["rank"]), dict(state["layers"])
            right = all(source in statistics for source in layers.values()) and all(
                s.vectors.dim() == 2 and s.values.shape == s.vectors.shape[1:] and s.rest.dim() == 0
                for s in statistics.values()
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Retention: expected a result of state_dict(), got another object ({error!r})") from None
        if not right:
            raise ValueError(
                "Retention: expected a result of state_dict(), but its names or the shapes of its tensors do not fit"
            )
        self.rank, self.layers, self.statistics = rank, layers, statistics


def plain_name(name: str) -> str:
    """Return a layer's name without the parts that DistributedDataParallel and torch.compile add."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def rest_of(trace: Any, values: Tensor, width: int) -> Tensor:
    """Return ``()`` the mean of all eigenvalues except the largest ones.

    Args:
        trace: sum of all ``width`` eigenvalues.
        values: the largest eigenvalues, ``(k,)``.
        width: d, the number of eigenvalues.
    """
    others = width - len(values)
    return ((trace - values.sum()) / others).clamp_min(0) if others else torch.zeros_like(values.sum())


def _retention(rank: int, layers: Mapping[str, str], sums: Mapping[str, Any], names: list[str]) -> Retention:
    statistics: dict[str, Statistics] = {}
    few: dict[str, int] = {}
    for name, total in sums.items():
        tokens, trace = int(total.tokens), float(total.trace)
        if trace - trace != 0:
            raise ValueError(
                f"retain: the input of {name} is not finite on retained text; check the text for broken rows, and "
                "whether the model overflows in half precision"
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
            f"retain: got {most} tokens, and rank={rank} needs at least {LEAST_TOKENS * rank}; pass more text (about "
            "16000 tokens are enough), or a smaller rank"
        )
    kept_layers = {name: source for name, source in layers.items() if source in statistics}
    blind = [name for name in names if name not in kept_layers]
    if blind:
        warnings.warn(
            f"retain: no retained text, or too little, reached {len(blind)} of {len(names)} LoRA layers "
            f"({blind[0]}, ...), so they train without retention. Fused kernels that do not call these layers as "
            "modules can be the cause; disable the kernels, or pass more text.",
            stacklevel=users_line(),
        )
    return Retention(rank, kept_layers, statistics)


def _agree_on(trouble: Exception | None) -> None:
    """Raise an error of any process in all processes, so that no process waits for another one."""
    troubles = [t for t in distributed.of_all(trouble) if t is not None]
    if troubles:
        raise trouble or troubles[0]
