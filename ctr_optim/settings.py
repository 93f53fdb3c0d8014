"""The checked, immutable options of the optimizer, and the steps at which periodic work is due."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

LEARNING_RATE = 8e-2  # Default with a trust region: large enough that the bound sets the step's length.
IGNORED = -100  # Label of tokens that the loss ignores, as in torch's cross_entropy.
EVERYDAY_RATE = 2e-4  # AdamW's usual rate for LoRA; the default without a trust region.


@dataclass(frozen=True)
class Settings:
    """Options of :class:`~ctr_optim.CTROptimizer` that all parameter groups share; that class documents them.

    Raises:
        ValueError, TypeError: if an option is invalid; names it, the given and the expected value.
    """

    max_kl: float | None
    kl_schedule: str
    calibration_interval: int | None
    trust_penalty: float
    curvature: str
    factor_structure: str
    factor_decay: float
    factor_interval: int
    basis_interval: int
    damping: float
    max_tokens: int | None
    resize: str
    loss_reduction: str

    def __post_init__(self) -> None:
        if self.max_kl is not None:
            _number("max_kl", self.max_kl, above=0.0, hint="nats per token, or None for no trust region")
            # Checkpoint validation treats an integer as a counter, but the live bound takes fractional values.
            object.__setattr__(self, "max_kl", float(self.max_kl))
        if self.calibration_interval is not None:
            _count(
                "calibration_interval", self.calibration_interval, hint="or None for the plain block-diagonal metric"
            )
        _number("trust_penalty", self.trust_penalty, least=0.0)
        _number("factor_decay", self.factor_decay, least=0.0, below=1.0)
        _count("factor_interval", self.factor_interval)
        _count("basis_interval", self.basis_interval)
        _number("damping", self.damping, above=0.0)
        if self.max_tokens is not None:
            _count("max_tokens", self.max_tokens, hint="or None for every token")
        _choice("resize", self.resize, ("auto", "physical", "masked"))
        _choice("loss_reduction", self.loss_reduction, ("mean", "sum"))


def due(step: int, interval: int) -> bool:
    """Return whether a step is a multiple of ``interval``, or 0, 1, 2, 4, 8, ...: early statistics change fast."""
    return step % interval == 0 or (step < interval and step & (step - 1) == 0)


def calibration_due(step: int, interval: int | None) -> bool:
    """Return whether the coupling is measured: at steps 0, 1, 4, 9, 16, ..., then every ``interval`` steps."""
    if interval is None:
        return False
    settled = (interval // 2) ** 2
    return (step - settled) % interval == 0 if step > settled else math.isqrt(step) ** 2 == step


def check_group(group: dict[str, Any]) -> None:
    """Check the options of one parameter group.

    Raises:
        ValueError, TypeError: if an option is invalid; names it, the given and the expected value.
    """
    if getattr(group["lr"], "numel", lambda: 1)() != 1:
        raise ValueError(f"lr: got a tensor of shape {tuple(group['lr'].shape)}; Tensor lr must be 1-element")
    _number("lr", _item(group["lr"]), least=0.0)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas: got {betas!r}, expected two numbers in [0, 1)")
    for index, beta in enumerate(betas):
        _number(f"betas[{index}]", _item(beta), least=0.0, below=1.0)
    _number("eps", group["eps"], least=0.0)
    _number("weight_decay", group["weight_decay"], least=0.0)


def _item(value: Any) -> Any:
    """Return the number in a one-element tensor; other values unchanged."""
    return value.item() if hasattr(value, "item") else value


def _number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    hint: str = "",
) -> None:
    expected = "a finite number"
    expected += f" >= {least:g}" if least > -math.inf else ""
    expected += f" > {above:g}" if above > -math.inf else ""
    expected += f" < {below:g}" if below < math.inf else ""
    expected += f" ({hint})" if hint else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected {expected}")
    if not (math.isfinite(value) and value >= least and value > above and value < below):
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def _count(name: str, value: Any, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name}: got {value!r} of type {type(value).__name__}, expected a whole number {hint}".rstrip()
        )
    if value < 1:
        raise ValueError(f"{name}: got {value!r}, expected at least 1 {hint}".rstrip())


def chosen(name: str, value: Any, registry: Mapping[str, T]) -> T:
    """Return the registry entry that an option names.

    Raises:
        ValueError: if the name is not registered.
    """
    _choice(name, value, tuple(registry))
    return registry[value]


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def keeps_shapes(resize: str, automatic: Callable[[], bool]) -> bool:
    """Return whether layers keep their shapes when ranks change.

    Args:
        resize: the optimizer's option.
        automatic: decides for ``"auto"``.
    """
    return automatic() if resize == "auto" else resize == "masked"
