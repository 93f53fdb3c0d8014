"""Registry of methods: how each adapts a base model, and which optimizer trains it.

Other methods come from their packages: PEFT for adapters and their optimizers, torch.optim, pytorch_optimizer and
torch-optimizer for optimizers. Three methods have no package: Sensitivity-LoRA, RefLoRA and GRIT. The modules
:mod:`~benchmarks.quality.sensitivity`, :mod:`~benchmarks.quality.reflora` and :mod:`~benchmarks.quality.grit` hold our
reading of their papers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.quality import grit, reflora, sensitivity
from benchmarks.quality.averaging import WeightAverage
from benchmarks.quality.plans import package_rate
from ctr_optim import CTROptimizer
from ctr_optim.trust_region.bound import BOUNDS, Auto

Batches = Iterator[dict[str, torch.Tensor]]
SETUP_BATCHES = 6  # batches that a method may use before the first step


@dataclass
class Run:
    """A model ready to train. ``after_step(step)`` is called after every step; ``finish()`` returns the final model."""

    model: Any
    optimizer: Any
    after_step: Callable[[int], None] = lambda step: None
    finish: Callable[[], Any] | None = None


def _config(spec: dict, **config: Any) -> LoraConfig:
    """Return LoRA on every linear layer; alpha defaults to twice the rank."""
    rank = spec["rank"]
    alpha = spec.get("alpha") or 2 * rank
    return LoraConfig(**{"r": rank, "lora_alpha": alpha, "target_modules": "all-linear", **config})


def _trainable(model: Any) -> list:
    return [p for p in model.parameters() if p.requires_grad]


def _adamw(model: Any, spec: dict) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trainable(model), lr=spec["lr"], **{"weight_decay": 0.0, **spec["options"]})


def _adapter(base: Any, spec: dict, batches: Batches, **config: Any) -> Run:
    """AdamW on PEFT's LoRA with ``config``."""
    model = get_peft_model(base, _config(spec, **config))
    return Run(model, _adamw(model, spec))


def _optimizer(base: Any, spec: dict, batches: Batches, package: str, name: str, **fixed: Any) -> Run:
    """An optimizer of ``package`` on plain LoRA."""
    optimizers = __import__(package, fromlist=[name])
    model = get_peft_model(base, _config(spec))
    return Run(model, getattr(optimizers, name)(_trainable(model), lr=spec["lr"], **fixed, **spec["options"]))


def _ctr(base: Any, spec: dict, batches: Batches) -> Run:
    """CTROptimizer with the spec's ``options``.

    Five options are not the optimizer's: ``initialize`` (arguments of :func:`ctr_optim.initialize`), ``adapter``
    (arguments of the LoRA config), ``lr_ratio`` (B's learning rate over A's), ``average`` (the share of
    :class:`.WeightAverage`, whose weights are evaluated) and ``auto`` (class constants of the default bound, such as
    ``{"outside": 0.03, "enough": 64}``).
    """
    options = deepcopy(spec["options"])
    start, share = options.pop("initialize", None), options.pop("average", None)
    if (constants := options.pop("auto", None)) is not None:
        options["kl_schedule"] = changed_bound(constants)
    model = get_peft_model(base, _config(spec, **options.pop("adapter", {})))
    if start is not None:
        from ctr_optim import initialize

        initialize(model, [next(batches) for _ in range(start.pop("batches", SETUP_BATCHES))], **start)
    scheduler = options.get("rank_scheduler")
    if scheduler is not None:
        scheduler.setdefault("total_steps", spec["steps"])
    if spec["lr"] is not None:
        options["lr"] = spec["lr"]
    params: list[Any] = list(model.parameters())
    if (ratio := options.pop("lr_ratio", None)) is not None:
        of_b = [p for name, p in model.named_parameters() if "lora_B" in name]
        of_a = [p for name, p in model.named_parameters() if "lora_A" in name]
        params = [{"params": of_a}, {"params": of_b, "lr": ratio * options.get("lr", package_rate("ctr"))}]
    run = Run(model, CTROptimizer(params, **options))
    if share is not None:
        _average(run, share)
    return run


def _average(run: Run, share: float) -> None:
    """Evaluate the average of the weights at the end of the run."""
    mean = WeightAverage(_trainable(run.model), share)

    def finish() -> Any:
        mean.put()
        return run.model

    run.after_step, run.finish = lambda step: mean.update(), finish


def changed_bound(constants: dict[str, float]) -> str:
    """Register the default bound with other class constants, and return its name for ``kl_schedule``.

    Raises:
        ValueError: a name that is no constant of the bound.
    """
    unknown = sorted(name for name in constants if not isinstance(getattr(Auto, name, None), float))
    if unknown:
        raise ValueError(f"auto: got {unknown}, expected constants of ctr_optim.trust_region.bound.Auto")
    name = "_".join(["auto", *(f"{key}{value:g}" for key, value in sorted(constants.items()))])
    BOUNDS[name] = type("Changed", (Auto,), {key: float(value) for key, value in constants.items()})
    return name


def _ctr_no_transport(base: Any, spec: dict, batches: Batches) -> Run:
    """CTROptimizer with a rank scheduler that loses its state at every rank event, as a comparison."""
    run = _ctr(base, spec, batches)
    steps: list[int] = []
    run.optimizer.on_rank_event(lambda event: steps.append(event.step))

    def after_step(step: int) -> None:
        if steps and steps[-1] == run.optimizer.steps:
            forget_state(run.optimizer)

    run.after_step = after_step
    return run


def forget_state(optimizer: CTROptimizer) -> None:
    """Reset moments, factors and bases, as in a new optimizer."""
    optimizer.state.clear()
    optimizer._restack()
    optimizer._arm()


def _lora_plus(base: Any, spec: dict, batches: Batches) -> Run:
    from peft.optimizers import create_loraplus_optimizer

    model = get_peft_model(base, _config(spec))
    fixed = {"loraplus_lr_ratio": 16, "weight_decay": 0.0}
    return Run(model, create_loraplus_optimizer(model, torch.optim.AdamW, lr=spec["lr"], **fixed))


def _lora_fa(base: Any, spec: dict, batches: Batches) -> Run:
    """LoRA-FA: A stays frozen, so that half of the adapter trains."""
    from peft.optimizers import create_lorafa_optimizer

    model = get_peft_model(base, config := _config(spec))
    return Run(model, create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=spec["lr"]))


def _riemannian(base: Any, spec: dict, batches: Batches) -> Run:
    from peft.optimizers import create_riemannian_optimizer

    model = get_peft_model(base, _config(spec))
    return Run(model, create_riemannian_optimizer(model, torch.optim.AdamW, lr=spec["lr"], weight_decay=0.0))


def _adalora(base: Any, spec: dict, batches: Batches) -> Run:
    """AdaLoRA: starts at 1.5 times the rank; alpha is twice that starting rank."""
    from peft import AdaLoraConfig

    rank, steps = spec["rank"], spec["steps"]
    start = max(2, round(1.5 * rank))
    config = AdaLoraConfig(
        init_r=start, target_r=rank, lora_alpha=2 * start, target_modules="all-linear",
        total_step=steps, tinit=steps // 10, tfinal=steps // 3, deltaT=5, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config)
    return Run(model, _adamw(model, spec), model.base_model.update_and_allocate)


def _eva(base: Any, spec: dict, batches: Batches) -> Run:
    """EVA: directions and ranks from the principal components of the inputs."""
    from peft import EvaConfig, initialize_lora_eva_weights

    config = _config(spec, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    model = get_peft_model(base, config, low_cpu_mem_usage=False)
    initialize_lora_eva_weights(model, [next(batches) for _ in range(SETUP_BATCHES)], show_progress_bar=False)
    return Run(model, _adamw(model, spec))


def _lora_ga(base: Any, spec: dict, batches: Batches) -> Run:
    """LoRA-GA: A and B from singular vectors of the full gradient; their product is subtracted from the base weight."""
    from peft import LoraGAConfig
    from peft.tuners.lora import preprocess_loraga

    config = _config(spec, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    config.target_modules = sorted({n.split(".")[-1] for n, m in base.named_modules() if _adaptable(n, m)})

    def backward() -> None:
        for _ in range(SETUP_BATCHES):
            base(**next(batches)).loss.backward()

    preprocess_loraga(base, config, backward)
    model = get_peft_model(base, config)
    return Run(model, _adamw(model, spec))


def _adaptable(name: str, module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def _sensitivity(base: Any, spec: dict, batches: Batches) -> Run:
    """Sensitivity-LoRA: ranks from the Fisher diagonal, trained by AdamW."""
    score = sensitivity.scores(sensitivity.measure(base, [next(batches) for _ in range(SETUP_BATCHES)]))
    size = {n: sum(m.weight.shape) for n, m in base.named_modules() if n in score}
    ranks = sensitivity.allocate(score, size, spec["rank"])
    alphas = {name: 2 * rank for name, rank in ranks.items()}
    return _adapter(base, spec, batches, rank_pattern=ranks, alpha_pattern=alphas)


def _reflora(base: Any, spec: dict, batches: Batches) -> Run:
    """RefLoRA: AdamW on the gradients of the best factorisation. Option ``warm_up``: steps of plain LoRA."""
    options = dict(spec["options"])
    warm_up = options.pop("warm_up", min(reflora.WARM_UP, spec["steps"] // 10))
    run = _adapter(base, {**spec, "options": options}, batches)
    reflora.Refactorer(run.model, run.optimizer, warm_up)
    return run


def _grit(base: Any, spec: dict, batches: Batches) -> Run:
    """GRIT: K-FAC in the rank space, reprojection, effective ranks. Option ``sides``: see :mod:`.grit`."""
    options = dict(spec["options"])
    sides = options.pop("sides", "published")
    run = _adapter(base, {**spec, "options": options}, batches)
    run.after_step = grit.Grit(run.model, run.optimizer, spec["steps"], sides).after_step
    return run


def _truncated(base: Any, spec: dict, batches: Batches) -> Run:
    """LoRA of twice the rank, cut after training by PEFT's ``convert_to_lora``: the simplest rank method."""
    run = _adapter(base, {**spec, "rank": 2 * spec["rank"]}, batches)

    def finish() -> Any:
        from peft import convert_to_lora, set_peft_model_state_dict

        config, weights = convert_to_lora(run.model, rank=spec["rank"])
        model = get_peft_model(run.model.unload(), config)
        set_peft_model_state_dict(model, weights)
        return model

    run.finish = finish
    return run


def _qlora(base: Any, spec: dict, batches: Batches) -> Run:
    """QLoRA: the base model's linear layers in bitsandbytes' NF4, with LoRA and AdamW."""
    import bitsandbytes

    for name, module in list(base.named_modules()):
        if _adaptable(name, module):
            new = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None,
                compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True,
            )  # fmt: skip
            new.load_state_dict({"weight": module.weight.data.cpu()}, strict=False)
            base.set_submodule(name, new.to(module.weight.device))  # Moving the layer to the GPU quantizes it.
    base.is_loaded_in_4bit = True
    return _adapter(base, spec, batches)


Build = Callable[[Any, dict, Batches], Run]
METHODS: dict[str, Build] = {
    "ctr": _ctr,
    "ctr_no_transport": _ctr_no_transport,
    "adamw": _adapter,
    "rslora": partial(_adapter, use_rslora=True),
    "dora": partial(_adapter, use_dora=True),
    "pissa": partial(_adapter, init_lora_weights="pissa"),
    "lora_plus": _lora_plus,
    "lora_fa": _lora_fa,
    "lora_ga": _lora_ga,
    "riemannian": _riemannian,
    "adalora": _adalora,
    "eva": _eva,
    "sensitivity": _sensitivity,
    "reflora": _reflora,
    "grit": _grit,
    "truncated": _truncated,
    "qlora": _qlora,
    "muon": partial(_optimizer, package="torch.optim", name="Muon", weight_decay=0.0),
    "soap": partial(_optimizer, package="pytorch_optimizer", name="SOAP", weight_decay=0.0),
    "lora_rite": partial(_optimizer, package="pytorch_optimizer", name="LoRARite"),
    "yogi": partial(_optimizer, package="torch_optimizer", name="Yogi"),
    "lamb": partial(_optimizer, package="torch_optimizer", name="Lamb"),
    "adabelief": partial(_optimizer, package="torch_optimizer", name="AdaBelief"),
}
