"""Registry of methods: those of :mod:`benchmarks.quality.methods`, and other methods against forgetting.

Options (``spec["options"]``) of the methods defined here:

adamw_kl            ``weight`` of ``KL(base || model)`` in the loss, on retained text or, without it, on the task
adamw_replay        ``share`` of the loss that is language modelling on retained text
corda               PEFT's CorDA, knowledge-preserving: the start avoids the principal directions of retained text
lora_null           LoRA-Null (arXiv 2503.02659), implemented from the paper: B A is the best rank-r part of W0 on the
                    directions that retained text hardly uses (``null``: their share of the text's energy, 0.01)
lora_null_frozen    ``lora_null`` with A frozen
sc_lora             SC-LoRA (arXiv 2505.23724), implemented from the paper: B = Q, A = Q^T W0, where Q holds the leading
                    eigenvectors of ``(1 - beta) Cov(task) - beta Cov(retained)`` of the layer's outputs (``beta``: 0.5)

The last three methods subtract B A from the frozen weight, so that training starts at the base model's function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.quality import methods as quality
from benchmarks.quality.methods import Batches, Run
from ctr_optim import CTROptimizer

Loss = Callable[[Any, dict[str, Tensor]], Tensor]
PIECES = 4  # of retained text in one step of a peer
CALIBRATION = 8  # pieces in one pass, where activations are measured


def plain_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the model's own loss."""
    return model(**batch).loss


@dataclass
class Context:
    """The inputs of a method besides the training batches."""

    batches: Batches
    retained: Tensor | None = None  # (pieces, length) token ids
    holdout: list[dict[str, Tensor]] = field(default_factory=list)
    loss: Loss = plain_loss  # A method may replace it.

    def pieces(self, method: str) -> Tensor:
        """Return the retained text; raise ValueError if the spec names none."""
        if self.retained is None:
            raise ValueError(f"retain: got no text for {method}, expected a dict of task, split, pieces and length")
        return self.retained


def _chunks(ids: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches of ``size`` pieces in an endless cycle."""
    for part in cycle(ids.split(size)):
        yield {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}


# -- CTROptimizer --------------------------------------------------------------------------------------------------


def new_arguments(spec: dict, context: Context) -> dict[str, Any]:
    """Return the arguments ``retain``, ``kl_budget`` and ``holdout`` of CTROptimizer that the spec sets.

    Raises:
        ValueError: the installed CTROptimizer lacks one of these arguments.
    """
    found: dict[str, Any] = {}
    retain = spec.get("retain")
    if isinstance(retain, dict):
        found["retain"] = list(context.pieces("ctr").split(CALIBRATION))
    elif retain is not None:
        found["retain"] = None if retain == "none" else retain
    if spec.get("kl_budget") is not None:
        found["kl_budget"] = spec["kl_budget"]
    if spec.get("holdout"):
        found["holdout"] = context.holdout
    absent = sorted(set(found) - set(inspect.signature(CTROptimizer).parameters))
    if absent:
        raise ValueError(f"CTROptimizer: got {absent}, which this version does not have; install a newer ctr_optim")
    return found


def _ctr(base: Any, spec: dict, context: Context) -> Run:
    return quality._ctr(base, {**spec, "options": {**spec["options"], **new_arguments(spec, context)}}, context.batches)


# -- terms in the loss ---------------------------------------------------------------------------------------------


def kl_to_base(model: Any, batch: dict[str, Tensor], outputs: Any = None) -> Tensor:
    """Return the mean ``KL(base || model)`` over the target tokens of a batch; base: the model without its adapter."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    here = batch["labels"][:, 1:] != -100
    with torch.no_grad(), model.disable_adapter():
        p = model(**inputs).logits[:, :-1][here].float().log_softmax(-1)
    logits = (model(**inputs) if outputs is None else outputs).logits
    q = logits[:, :-1][here].float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def _adamw_kl(base: Any, spec: dict, context: Context) -> Run:
    options = dict(spec["options"])
    weight = options.pop("weight", 0.1)
    text = None if context.retained is None else _chunks(context.retained, PIECES)

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        outputs = model(**batch)
        kl = kl_to_base(model, batch, outputs) if text is None else kl_to_base(model, next(text))
        return outputs.loss + weight * kl

    context.loss = loss
    return quality._adapter(base, {**spec, "options": options}, context.batches)


def _adamw_replay(base: Any, spec: dict, context: Context) -> Run:
    options = dict(spec["options"])
    share = options.pop("share", 0.2)
    text = _chunks(context.pieces("adamw_replay"), PIECES)
    context.loss = lambda model, batch: (1 - share) * model(**batch).loss + share * model(**next(text)).loss
    return quality._adapter(base, {**spec, "options": options}, context.batches)


# -- starts --------------------------------------------------------------------------------------------------------


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers that LoRA adapts, by name."""
    return {n: m for n, m in model.named_modules() if quality._adaptable(n, m)}


@contextmanager
def _second_moments(model: nn.Module, outputs: bool) -> Iterator[dict[str, Tensor]]:
    """Yield sums of x x^T of every layer's input (or output), float32; forward passes within the context fill them."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + x.mT @ x

    def hook(name: str) -> Any:
        return lambda module, given, output: add(name, output if outputs else given[0])

    handles = [module.register_forward_hook(hook(name)) for name, module in linear_layers(model).items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def moments(model: Any, batches: list[dict[str, Tensor]], outputs: bool = False) -> dict[str, Tensor]:
    """Return the mean of x x^T over tokens, ``(d, d)`` per layer. Rows pass one by one, so that padding is excluded."""
    count = 0
    with _second_moments(model, outputs) as sums:
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                length = int(mask.sum())
                model(input_ids=ids[None, :length])
                count += length
    return {name: total / count for name, total in sums.items()}


@torch.no_grad()
def put_start(model: Any, start: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Set A and B of PEFT's layers so that the adapter adds ``B A``, and subtract ``B A`` from the frozen weight."""
    for name, (a, b) in start.items():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b / layer.scaling["default"])
        layer.base_layer.weight -= (b @ a).to(layer.base_layer.weight.dtype)


def null_start(weight: Tensor, second: Tensor, rank: int, share: float) -> tuple[Tensor, Tensor]:
    """Return A, ``(rank, d_in)``, and B, ``(d_out, rank)``: the best rank-r part of ``W0 U U^T``.

    U holds the directions of least energy in ``second``, ``(d_in, d_in)``. Together they hold at most ``share`` of the
    energy; there are at least ``rank`` of them.
    """
    values, vectors = torch.linalg.eigh(second.double())
    energy = values.clamp_min(0).cumsum(0)
    count = max(rank, int((energy <= share * energy[-1]).sum()))
    unused = vectors[:, :count]
    u, s, vh = torch.linalg.svd(weight.double() @ unused @ unused.mT, full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float()


def _lora_null(base: Any, spec: dict, context: Context, frozen: bool) -> Run:
    options = dict(spec["options"])
    share = options.pop("null", 0.01)
    ids = context.pieces("lora_null")
    second = moments(base, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    weights = {name: layer.weight.detach().float() for name, layer in linear_layers(base).items()}
    start = {name: null_start(weights[name], second[name], spec["rank"], share) for name in weights}
    model = get_peft_model(base, quality._config(spec))
    put_start(model, start)
    if frozen:
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    return Run(model, quality._adamw(model, {**spec, "options": options}))


def _sc_lora(base: Any, spec: dict, context: Context) -> Run:
    options = dict(spec["options"])
    beta = options.pop("beta", 0.5)
    ids = context.pieces("sc_lora")
    retained = moments(base, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], outputs=True)
    task = moments(base, [next(context.batches) for _ in range(4 * quality.SETUP_BATCHES)], outputs=True)
    start = {}
    for name, layer in linear_layers(base).items():
        difference = (1 - beta) * task[name].double() - beta * retained[name].double()
        q = torch.linalg.eigh(difference).eigenvectors[:, -spec["rank"] :].float()
        start[name] = (q.mT @ layer.weight.detach().float(), q)
    model = get_peft_model(base, quality._config(spec))
    put_start(model, start)
    return Run(model, quality._adamw(model, {**spec, "options": options}))


def _corda(base: Any, spec: dict, context: Context) -> Run:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = quality._config(spec, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    config.target_modules = sorted({name.split(".")[-1] for name in linear_layers(base)})
    ids = context.pieces("corda")

    def passes() -> None:
        with torch.no_grad():
            for piece in ids:
                base(input_ids=piece[None])

    preprocess_corda(base, config, run_model=passes)
    model = get_peft_model(base, config)
    return Run(model, quality._adamw(model, spec))


# -- the registry --------------------------------------------------------------------------------------------------


def _known(base: Any, spec: dict, context: Context, name: str) -> Run:
    return quality.METHODS[name](base, spec, context.batches)


METHODS: dict[str, Callable[[Any, dict, Context], Run]] = {
    **{name: partial(_known, name=name) for name in quality.METHODS},
    "ctr": _ctr,
    "adamw_kl": _adamw_kl,
    "adamw_replay": _adamw_replay,
    "corda": _corda,
    "lora_null": partial(_lora_null, frozen=False),
    "lora_null_frozen": partial(_lora_null, frozen=True),
    "sc_lora": _sc_lora,
}


def build(base: Any, spec: dict, context: Context) -> Run:
    """Return a copy of ``base`` with its adapter and optimizer. Train with ``context.loss``."""
    if spec["method"] not in METHODS:
        raise ValueError(f"method: got {spec['method']!r}, expected one of {sorted(METHODS)}")
    return METHODS[spec["method"]](deepcopy(base), spec, context)
