"""Choose ranks and initial directions from a few batches, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.optimizer import CTROptimizer
from ctr_optim.ranks.allocation import reallocate, survey
from ctr_optim.ranks.events import RankEvent
from ctr_optim.ranks.scheduler import RankScheduler


def initialize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    move_ranks: bool = True,
    factor_structure: str = "diagonal",
    damping: float = 0.1,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
) -> list[RankEvent]:
    """Choose the ranks of an untrained adapter, and start A in the directions of steepest loss decrease.

    The function makes two forward and backward passes over ``batches``, without training steps. The first pass
    measures the Kronecker factors; the second sketches the whitened gradient. A gets the leading right singular
    directions of this gradient. B stays zero, so the model's outputs do not change. Build the optimizer for training
    after this call.

    Args:
        model: a model with LoRA layers whose B is zero.
        batches: a few batches (six work well). Dicts are passed as ``model(**batch)``, whose ``.loss`` is used.
        budget: mean rank; None for the model's own.
        min_rank, max_rank: smallest and largest rank of a layer. ``max_rank=None`` is four times the mean rank.
        move_ranks: whether to change ranks. If False, layers keep their ranks and get only new directions.
        factor_structure: structure of the whitening: ``"diagonal"``, ``"lowrank"`` or ``"dense"``.
        damping: damping of the whitening, relative to the mean eigenvalue.
        loss_fn: called as ``loss_fn(model, batch)`` if ``model(**batch).loss`` is not the loss.

    Returns:
        One event for each layer.

    Raises:
        ValueError: the adapter is trained already, there are no batches, or the budget is impossible.
        TypeError: a batch is not a dict, and ``loss_fn`` is not given.
    """
    kept = list(batches)
    if not kept:
        raise ValueError("initialize: got no batches, expected a few (six work well)")
    trainable = [p for p in model.parameters() if p.requires_grad]
    scout = CTROptimizer(
        trainable,
        lr=0.0,
        model=model,
        max_kl=None,
        calibration_interval=None,
        factor_interval=1,
        factor_decay=0.999,
        factor_structure=factor_structure,
        damping=damping,
        max_tokens=None,
    )
    try:
        stale = [pair.name for pair in scout.pairs if bool((pair.B != 0).any())]
        if stale or not scout.pairs:
            raise ValueError(
                f"initialize: expected untrained LoRA layers (B = 0), found {stale[:3] if stale else 'none at all'}. "
                "Call it before training. Do not use it with PiSSA, OLoRA or another method that initializes B"
            )
        mean = sum(p.rank for p in scout.pairs) / len(scout.pairs)
        cap = max_rank if max_rank is not None else max(min_rank, round(4 * (budget or mean)))
        _pass(scout, model, kept, loss_fn)
        scout.open_sketch(max(cap, *(p.rank for p in scout.pairs)))
        _pass(scout, model, kept, loss_fn)
        surveys = [s for block in scout.blocks for s in survey(block, len(kept), damping, fresh=True)]
        if move_ranks:
            scheduler = RankScheduler(budget=budget, min_rank=min_rank, max_rank=cap)
            return reallocate(surveys, scheduler, scout.state.get, step=0, fresh=True)
        events = []
        for s in surveys:
            one = RankScheduler(min_rank=s.pair.rank, max_rank=s.pair.rank, multiple=1)
            events += reallocate([s], one, scout.state.get, step=0, fresh=True)
        return events
    finally:
        scout.close()
        model.zero_grad(set_to_none=True)


def _pass(
    scout: CTROptimizer, model: nn.Module, batches: list[Any], loss_fn: Callable[[nn.Module, Any], Tensor] | None
) -> None:
    """Run forward, backward and a step with lr=0 for every batch; only the scout's statistics change."""
    for batch in batches:
        with torch.enable_grad():
            if loss_fn is not None:
                loss = loss_fn(model, batch)
            elif isinstance(batch, Mapping):
                loss = model(**batch).loss
            else:
                raise TypeError(f"initialize: got a batch of type {type(batch).__name__}; pass dicts, or loss_fn=...")
            loss.backward()  # type: ignore[no-untyped-call]
        scout.step()
        scout.zero_grad()
