"""Ways to cut a trained adapter: ``compress``, and others at the number of parameters that ``compress`` leaves."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.quality.tasks import Example, collate
from benchmarks.real.measure import in_batches
from ctr_optim import compress
from ctr_optim.linalg.shapes import sized
from ctr_optim.model.registry import find_pairs
from ctr_optim.ranks.adapter import Adapter, Weights, adapter_of
from ctr_optim.ranks.measurement import Measurement
from ctr_optim.ranks.truncation import ranks_after, removals
from ctr_optim.ranks.valuation import Existing, existing_directions

Record = dict[str, Any]
WAYS = ("svd", "svd_uniform", "magnitude")


def batches_of(examples: list[Example], device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Return the rows in batches with a limited number of tokens."""
    return [collate([examples[i] for i in part], device) for part in in_batches(examples)]


class Test:
    """Measures the test loss and the KL from the uncut adapter, both in nats per target token."""

    def __init__(self, model: Any, layers: Adapter, batches: list[dict[str, torch.Tensor]]) -> None:
        self.layers = layers
        self.measurement = Measurement(model, batches, None, "benchmark")
        self.measurement.factors(list(layers.pairs.values()))
        self.measurement.keep_references(lambda: layers.write(layers.whole))

    def now(self) -> Record:
        """Measure the adapter in its present state, cut or uncut, then restore its full ranks."""
        held = {n: (p.A.detach().clone(), p.B.detach().clone()) for n, p in self.layers.pairs.items()}
        ranks = {n: len(a) for n, (a, _) in self.layers.whole.items()}
        self.layers.resize(self.layers.whole)
        return self.of({n: (sized(a, (0,), ranks[n]), sized(b, (1,), ranks[n])) for n, (a, b) in held.items()})

    def of(self, weights: Weights) -> Record:
        """Measure the adapter with other weights, then restore the uncut weights."""
        cost = self.measurement.cost(lambda: None, lambda: self.layers.write(weights))
        self.layers.write(self.layers.whole)
        return {"loss": cost.loss, "rise": cost.loss - self.measurement.loss, "kl": cost.kl}


def cuts(
    model: Any, held: list[Example], test: list[Example], tolerances: list[float], converting: list[float],
    device: torch.device, refit: int = 0,
) -> list[Record]:  # fmt: skip
    """Return records of the uncut adapter and of every way to cut it.

    Args:
        model: the model with the trained adapter.
        held: held-out rows that ``compress`` measures on.
        test: rows that all results are measured on.
        tolerances: tolerances of ``compress``, nats per loss token.
        converting: tolerances at which ``convert_to_lora`` also runs.
        device: the device of the model.
        refit: refit steps of ``compress``.
    """
    layers = adapter_of(model, None, "benchmark")
    whole = sum(pair.rank * pair.cost for pair in layers.pairs.values())
    one = sum(layers.costs.values())  # parameters of rank 1 everywhere
    on_test, measured = Test(model, layers, batches_of(test, device)), batches_of(held, device)

    def record(way: str, parameters: int, figures: Record, **more: Any) -> Record:
        return {"way": way, "parameters": parameters, "share": parameters / whole, **figures, **more}

    records = [record("uncut", whole, on_test.now())]
    for tolerance in tolerances:
        began = time.time()
        done = compress(model, tolerance, measured, **({"refit": refit} if refit else {}))
        more = {"held_cost": done.cost, "held_kl": done.kl, "seconds": time.time() - began}
        left = done.parameters_after
        records.append(record("compress", left, on_test.now(), tolerance=tolerance, **more))
        for way in WAYS:
            weights, parameters = truncated(layers, way, left)
            records.append(record(way, parameters, on_test.of(weights), tolerance=tolerance))
        uniform = left // one
        if tolerance in converting and uniform >= 1:
            try:
                figures = on_test.of(converted(model, uniform))
            except Exception as error:  # A method that cannot run here is a result, too.
                figures = {"error": f"{type(error).__name__}: {error}"[:300]}
            records.append(record("convert_to_lora", uniform * one, figures, tolerance=tolerance))
    return records


def truncated(layers: Adapter, way: str, parameters: int) -> tuple[Weights, int]:
    """Return an adapter's weights cut to at most ``parameters``, and their number of parameters."""
    directions = {}
    for name, pair in layers.pairs.items():
        a, b = pair.A.detach().double().cpu(), pair.scaling * pair.B.detach().double().cpu()
        if way == "magnitude":
            size = (a.norm(dim=1) * b.norm(dim=0)).square()
            order = size.argsort(descending=True)
            eye = torch.eye(len(a), dtype=a.dtype)
            directions[name] = Existing(size[order], eye[order], eye[:, order])
        else:
            directions[name] = existing_directions(a @ a.mT, b.mT @ b)
    ranks = {name: len(a) for name, (a, _) in layers.whole.items()}
    worth = {name: e.utility.tolist() for name, e in directions.items()}
    order = removals(worth, layers.costs, uniform=way == "svd_uniform")
    left = sum(rank * layers.costs[name] for name, rank in ranks.items())
    count = 0
    while left > parameters and count < len(order):
        left -= order[count].parameters
        count += 1
    return layers.cut(directions, ranks_after(order, count, ranks)), left


def converted(model: Any, rank: int) -> Weights:
    """Return the result of PEFT's ``convert_to_lora`` as weights of the adapter's layers."""
    from peft import convert_to_lora

    config, saved = convert_to_lora(model, rank=rank, progressbar=False)
    weights = {}
    for pair in find_pairs(model):
        prefix = f"base_model.model.{pair.name}"
        a, b = saved[f"{prefix}.lora_A.weight"].to(pair.A), saved[f"{prefix}.lora_B.weight"].to(pair.B)
        weights[pair.name] = a, b * (config.lora_alpha / config.r / pair.scaling)
    return weights
