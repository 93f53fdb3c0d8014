"""Ranks and start directions from a few batches, before the first step."""

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
    """Give every fresh LoRA layer the directions in which the loss falls fastest, and the rank that they are worth.

    Two passes over ``batches`` (forward and backward, no step): the first measures the Kronecker factors, the second
    sketches the whitened gradient. A gets the leading right singular directions, B stays zero: the model's function
    does not change. Build the training's optimizer afterwards.

    Args:
        model: with LoRA layers whose B is zero.
        batches: a handful (six serve well); dicts are passed as ``model(**batch)``, whose ``.loss`` is used.
        budget: mean rank; None for what the model has.
        min_rank, max_rank: of every layer; ``max_rank=None`` is four times the mean.
        move_ranks: False gives start directions only, at the ranks that the layers have.
        factor_structure: ``"diagonal"``, ``"lowrank"`` or ``"dense"`` whitening.
        damping: of the whitening, relative to the mean eigenvalue.
        loss_fn: ``loss_fn(model, batch)`` where ``model(**batch).loss`` is not the loss.

    Returns:
        one event a layer.

    Raises:
        ValueError: where an adapter is not fresh, there are no batches, or the budget cannot be met.
    """
    kept = list(batches)
    if not kept:
        raise ValueError("initialize: got no batches, expected a few (six serve well)")
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
                f"initialize: expected fresh LoRA layers (B = 0), found {stale[:3] if stale else 'none at all'}; "
                "call it before training, and not with PiSSA, OLoRA or other starts of their own"
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
    """Forward, backward and a step of no length for every batch: only the scout's factors change."""
    for batch in batches:
        with torch.enable_grad():
            if loss_fn is not None:
                loss = loss_fn(model, batch)
            elif isinstance(batch, Mapping):
                loss = model(**batch).loss
            else:
                raise TypeError(f"initialize: a batch is a {type(batch).__name__}; pass dicts, or loss_fn=...")
            loss.backward()  # type: ignore[no-untyped-call]
        scout.step()
        scout.zero_grad()
