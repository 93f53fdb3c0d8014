"""The verdict on a run: one line of text."""

from __future__ import annotations

from collections.abc import Iterator

from ctr_optim.report.run import Run


def verdict(run: Run) -> str:
    """Return one line on a run: how often the bound acted, the KL from the base model, and the best losses."""
    if not run.logs:
        return (
            "Nothing was logged. With CTRCallback, lower logging_steps; in your own loop, call EventLog.log(loss=...)."
        )
    return "; ".join([*_bound(run), *_way(run), *_losses(run), *_skipped(run)]) + "."


def _bound(run: Run) -> Iterator[str]:
    steps, scales = run.series("trust/scale")
    limits = run.series("trust/max_kl")[1]
    source = str(run.last.get("trust/source", ""))
    if not limits:
        yield "No step was bounded in KL"
        return
    if source.startswith("assumed"):
        yield f"The KL was not measured ({source})"
    acted = sum(scale < 1 for scale in scales)
    logged = f"{acted} of {len(steps)} logged steps"
    yield f"The bound acted in {logged}" if acted else f"The bound acted in {logged}: lr alone set the step length"


def _way(run: Run) -> Iterator[str]:
    used, limit = run.last.get("budget/used"), run.last.get("budget/limit")
    if used is not None and limit is not None:
        yield f"{used:.2f} of {limit:.2f} nats of the budget used"
    elif run.last.get("kl_from_base") is not None:
        yield f"{run.last['kl_from_base']:.2f} nats per token from the base model (an estimate)"


def _losses(run: Run) -> Iterator[str]:
    for what, key in (("eval loss", run.eval_key), ("hold-out loss", "holdout/loss")):
        best = run.best(key) if key is not None else None
        if key is None or best is None:
            continue
        steps, values = run.series(key)
        at_end = best[0] == steps[-1]
        later = "" if at_end else f", {values[-1] - best[1]:.3g} nats higher at the end"
        yield f"{what} best at {'the end, ' if at_end else ''}step {best[0]} ({best[1]:.4g}){later}"


def _skipped(run: Run) -> Iterator[str]:
    skipped = run.last.get("skipped_steps", 0)
    if skipped:
        yield f"{skipped} {'step' if skipped == 1 else 'steps'} skipped because gradients were not finite"
