"""``optimizer.step()`` alone: CTROptimizer and other optimizers on the same parameters and gradients."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.performance.bench import PERIOD, Bench, Resumable
from benchmarks.performance.common import kind_of, spread, state_bytes


def peers(bench: Bench) -> dict[str, Callable[[list[nn.Parameter]], Optimizer]]:
    """Return the constructors of the other optimizers, each with its library's intended options."""

    def from_library(name: str, **options: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
        def make(params: list[nn.Parameter]) -> Optimizer:
            import pytorch_optimizer

            return getattr(pytorch_optimizer, name)(params, lr=1e-5, **options)

        return make

    def riemannian(params: list[nn.Parameter]) -> Optimizer:
        from peft.optimizers import create_riemannian_optimizer

        return create_riemannian_optimizer(bench.model, torch.optim.AdamW, lr=1e-5, weight_decay=0.0)

    return {
        "AdamW (fused)": lambda params: torch.optim.AdamW(params, lr=1e-5, fused=True),
        "AdamW (foreach)": lambda params: torch.optim.AdamW(params, lr=1e-5, foreach=True),
        "Muon": lambda params: torch.optim.Muon(params, lr=1e-5),
        "LoRA-RITE": from_library("LoRARite"),
        "Riemannian AdamW": riemannian,
        "SOAP (rank side only)": from_library("SOAP", max_precondition_dim=256),
        "Shampoo": from_library("ScalableShampoo", block_size=512),
    }


def time_steps(
    bench: Bench, optimizer: Optimizer, grads: list[Tensor], params: list[nn.Parameter], warm: int, seconds: float
) -> list[float]:
    """Return the milliseconds of single steps over one period, or of fewer steps after ``seconds``.

    Gradients are restored before each step, because some optimizers change them.
    """
    times: list[float] = []
    start = time.perf_counter()
    for index in count():
        torch._foreach_copy_([p.grad for p in params], grads)
        spent = bench.clock.alone(optimizer.step)
        if index >= warm:
            times.append(spent)
        if len(times) == PERIOD or (times and time.perf_counter() - start > seconds):
            return times
    raise AssertionError


def step_alone(bench: Bench, resumable: Resumable, seconds: float, wide_soap: bool) -> None:
    """Measure ``optimizer.step()`` alone, for all optimizers on the same parameters and gradients."""
    params = bench.params
    grads = ctr_alone(bench, resumable, params, 10 * seconds)
    weights = [p.detach().clone() for p in params]
    todo = [(name, make, params, grads) for name, make in peers(bench).items()]
    if wide_soap:  # At its defaults SOAP also decomposes the wide sides, so that one block must do.
        some = len(params) // bench.model.config.num_hidden_layers
        todo.append((f"SOAP (defaults, {some // 2} layers)", peers_soap, params[:some], grads[:some]))
    for name, make, subset, wanted in todo:
        one_peer(bench, name, make, subset, wanted, seconds)
        with torch.no_grad():
            torch._foreach_copy_(params, weights)
        bench.free()
    for p in params:
        p.grad = None


def ctr_alone(bench: Bench, resumable: Resumable, params: list[nn.Parameter], seconds: float) -> list[Tensor]:
    """Measure CTROptimizer's step alone; return its gradients for the other optimizers."""
    optimizer = resumable.open()
    bench.forward_backward()
    grads = [p.grad.detach().clone() for p in params if p.grad is not None]
    warm = 0 if optimizer.steps >= PERIOD else PERIOD
    kinds = [kind_of(optimizer)]
    optimizer.register_step_post_hook(lambda *_: kinds.append(kind_of(optimizer)))
    times = time_steps(bench, optimizer, grads, params, warm, seconds)
    of_kind: dict[str, list[float]] = {}
    for kind, spent in zip(kinds[warm:], times, strict=False):
        of_kind.setdefault(kind, []).append(spent)
    by_kind = {kind: statistics.median(some) for kind, some in of_kind.items()}
    bench.report.add("step", method="CTR", ms=spread(times), by_kind=by_kind, state_bytes=state_bytes(optimizer))
    resumable.close(optimizer)
    return grads


def peers_soap(params: list[nn.Parameter]) -> Optimizer:
    """Return SOAP at its defaults."""
    import pytorch_optimizer

    return pytorch_optimizer.SOAP(params, lr=1e-5)


def one_peer(
    bench: Bench, name: str, make: Any, params: list[nn.Parameter], grads: list[Tensor], seconds: float
) -> None:
    """Measure the step of another optimizer, or report its error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = make(params)
            times = time_steps(bench, optimizer, grads, params, 2, seconds)
        bench.report.add("step", method=name, ms=spread(times), state_bytes=state_bytes(optimizer), tensors=len(params))
    except Exception as error:  # An optimizer that cannot run here is a result, too.
        bench.report.add("step", method=name, error=f"{type(error).__name__}: {error}"[:300])
