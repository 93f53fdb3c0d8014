"""Validation of a checkpoint's optimizer state, field by field, before anything is loaded."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.checkpoint.numbers import FORMAT
from ctr_optim.curvature.base import Curvature
from ctr_optim.curvature.blocks import OVERSAMPLED, factor_state, sketch_state
from ctr_optim.curvature.factors import STRUCTURES
from ctr_optim.curvature.kfac import KFAC
from ctr_optim.direction.average import AVERAGE, TRAINING
from ctr_optim.direction.stack import initial_state
from ctr_optim.holdout.judge import BEST
from ctr_optim.model.coordinates import SCALES, VECTORS, empty
from ctr_optim.model.pair import LoRAPair
from ctr_optim.retention.boundary import GRADIENT
from ctr_optim.runtime.messages import users_line
from ctr_optim.settings import Settings, check_group
from ctr_optim.trust_region.bound import BOUNDS
from ctr_optim.trust_region.rows import REGISTERS

State = dict[nn.Parameter, dict[str, Tensor]]

Groups = list[dict[str, Any]]
# Numbers that a checkpoint may lack: it comes from an earlier version, or its run had no kl_budget, no holdout, or a
# bound that does not count rows.
OPTIONAL = {
    "budget_used", "budget_rate", "budget_path", "budget_age", "budget_ahead", "budget_span", "budget_turn",
    "budget_length", "rows_seen", "rows_sketch", "rows_spared", "holdout_loss", "holdout_best", "holdout_best_step",
    "holdout_factor", "watched", "window_seen", "window_distinct", "next_seen", "next_distinct", "credit", "error",
    "loss_scale", "loss_scale_unit", "others_ratio", "others_measured", "averaged_steps", "average_used",
}  # fmt: skip
LATER = {"version", "budget", "rate", "flat", "tokens"}  # numbers that only checkpoints of format 1 may lack


def checked(
    state_dict: Any,
    groups: Sequence[dict[str, Any]],
    pairs: Sequence[LoRAPair],
    settings: Settings,
    curvature: Curvature,
    numbers: dict[str, Any],
) -> tuple[State, Groups, dict[str, Any]]:
    """Return the state, parameter groups and numbers to load, as copies that share no memory with ``state_dict``.

    The function changes nothing in the optimizer.

    Args:
        state_dict: a result of ``CTROptimizer.state_dict()``.
        groups: the optimizer's own parameter groups.
        pairs: its LoRA layers.
        settings: its options.
        curvature: its curvature.
        numbers: its own numbers, for comparison of the types.

    Raises:
        ValueError: if the checkpoint belongs to another optimizer or model, an entry is missing, or an entry has the
            wrong type, shape or value.
    """
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if not (isinstance(state_dict, Mapping) and isinstance(state_dict.get(key), kind)):
            raise ValueError(f"checkpoint: no {key!r} in it; expected a result of CTROptimizer.state_dict()")
    new_groups, loaded = _checked_groups(state_dict["param_groups"], groups, numbers)
    loaded["max_kl"] = _restored_bound(loaded["max_kl"], settings)
    pair_of = {p: pair for pair in pairs for p in (pair.A, pair.B)}
    state: State = {}
    for mine, theirs in zip(groups, state_dict["param_groups"], strict=True):
        for p, key in zip(mine["params"], theirs["params"], strict=True):
            entry = state_dict["state"].get(key)
            if not entry:
                continue
            expected = _expected_entry(p, entry, pair_of.get(p), settings, curvature)
            state[p] = _checked_entry(key, entry, expected, p, settings)
    ours = {p for group in groups for p in group["params"]}
    halved = any({pair.A, pair.B} <= ours and (pair.A in state) != (pair.B in state) for pair in pairs)
    if halved or (pairs and not state and loaded["steps"]):
        raise ValueError(
            "checkpoint: the state of trained parameters is missing in it; expected the complete result of "
            "CTROptimizer.state_dict()"
        )
    return state, new_groups, loaded


def _checked_groups(
    theirs: list[Any], ours: Sequence[dict[str, Any]], numbers: dict[str, Any]
) -> tuple[Groups, dict[str, Any]]:
    for group in theirs:
        params = group.get("params") if isinstance(group, Mapping) else None
        if not (isinstance(params, list) and all(isinstance(key, (int, str)) for key in params)):
            raise ValueError("checkpoint: a parameter group has no list of parameter keys; the file is damaged")
    sizes, expected = [len(g["params"]) for g in theirs], [len(g["params"]) for g in ours]
    if sizes != expected:
        raise ValueError(f"checkpoint: got parameter groups with {sizes} parameters, expected {expected}")
    if not isinstance(theirs[0].get("ctr"), Mapping):
        raise ValueError("checkpoint: another optimizer wrote it; expected a result of CTROptimizer.state_dict()")
    keys = [key for group in theirs for key in group["params"]]
    if len(set(keys)) < len(keys):
        raise ValueError("checkpoint: a parameter occurs twice in its parameter groups; the file is damaged")
    groups = []
    for mine, group in zip(ours, theirs, strict=True):
        missing = {"lr", "betas", "eps", "weight_decay", "maximize", "foreach"} - group.keys()
        if missing:
            raise ValueError(
                f"checkpoint: a parameter group without {', '.join(sorted(missing))}; another optimizer wrote it"
            )
        try:
            check_group(dict(group))
        except (TypeError, ValueError) as error:
            raise ValueError(f"checkpoint: {error}") from None
        for name in ("peak_lr", "initial_lr"):
            if name in group:
                _check_number(name, group[name])
        kept = {"param_names": mine["param_names"]} if "param_names" in mine else {}
        groups.append({**kept, **copy.deepcopy({**group, "params": None}), "params": mine["params"]})
    shared = groups[0].pop("ctr")
    version = shared.get("version", 1)
    if not (isinstance(version, int) and 1 <= version <= FORMAT) or isinstance(version, bool):
        raise ValueError(
            f"checkpoint: version is {version!r}, expected 1 to {FORMAT}; update ctr_optim if a newer version wrote it"
        )
    missing = numbers.keys() - shared.keys() - (LATER if version == 1 else set()) - OPTIONAL
    if missing:
        raise ValueError(
            f"checkpoint: no {', '.join(sorted(missing))} among its numbers, since another version or other options "
            "wrote it; build the optimizer with the options that wrote it"
        )
    for name, value in shared.items():
        if name == "rows_sketch":
            _check_sketch(value)
            continue
        counts = isinstance(numbers.get(name), int)
        if not (value is None and not counts):
            _check_number(name, value, whole=counts)
    return groups, shared


def _check_sketch(value: Any) -> None:
    if not (isinstance(value, str) and len(value) in (0, 2 * REGISTERS) and set(value) <= set("0123456789abcdef")):
        raise ValueError(f"checkpoint: rows_sketch is damaged, expected a string of {2 * REGISTERS} hexadecimal digits")


def _check_number(name: str, value: Any, whole: bool = False) -> None:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 and not whole else value
    kind = "a whole number" if whole else "a finite number"
    right = isinstance(number, int if whole else (int, float)) and not isinstance(number, bool)
    signed = name in ("holdout_loss", "holdout_best")
    if not (right and math.isfinite(number) and (signed or number >= 0)):
        raise ValueError(f"checkpoint: {name} is {value!r}, expected {kind} (at least 0, unless it is a loss)")


def _restored_bound(saved: float | None, settings: Settings) -> float | None:
    """Return the bound to continue with: the saved one if the schedule adapts it, else the constructor's."""
    own = settings.max_kl
    adapts = BOUNDS[settings.kl_schedule].needs_closure and own is not None
    if adapts and saved is not None:
        return float(saved)
    if saved != own and not adapts:
        warnings.warn(
            f"checkpoint: max_kl={saved!r} in the run that wrote it, but this optimizer has max_kl={own!r} and keeps "
            "this value. To continue the same run, build the optimizer with the checkpoint's value.",
            stacklevel=users_line(),
        )
    return own


def _expected_entry(
    p: nn.Parameter, entry: Any, pair: LoRAPair | None, settings: Settings, curvature: Curvature
) -> dict[str, Tensor]:
    """Return tensors with the expected shapes and dtypes of one parameter's state.

    Args:
        p: the parameter.
        entry: the checkpoint's state of this parameter; sketches are expected with its number of columns.
        pair: the LoRA layer whose A or B is ``p``; None for other parameters.
        settings: the optimizer's options.
        curvature: its curvature.
    """
    # The meta device allocates no memory: the parameter may be as large as a model's embedding.
    bare = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
    wide = bare.to(torch.promote_types(p.dtype, torch.float32))
    stored = {BEST: bare, TRAINING: bare, AVERAGE: wide, GRADIENT: wide}
    best: dict[str, Tensor] = {k: v for k, v in stored.items() if isinstance(entry, Mapping) and k in entry}
    if pair is not None and isinstance(curvature, KFAC):
        expected = initial_state(bare, -1 if p is pair.B else -2)
        if p is pair.B:
            expected |= factor_state(pair, STRUCTURES[settings.factor_structure]) | _sketches_like(entry, pair)
        return expected | _retained_like(entry, bare, pair) | best
    expected = initial_state(bare, None)
    curvature.prepare({bare: expected}, [bare])
    return expected | _retained_like(entry, bare, pair) | best


def _sketches_like(entry: Any, pair: LoRAPair) -> dict[str, Tensor]:
    """Return empty sketches with as many columns as the saved ones; no entry if none are saved."""
    saved = entry.get("sketch_range") if isinstance(entry, Mapping) else None
    columns = saved.shape[-1] if isinstance(saved, Tensor) and saved.dim() else 0
    return sketch_state(pair, columns - OVERSAMPLED) if columns else {}


def _retained_like(entry: Any, bare: Tensor, pair: LoRAPair | None) -> dict[str, Tensor]:
    """Return empty retention coordinates in the shapes of the checkpoint's, if ``bare`` is an A that has them."""
    vectors = entry.get(VECTORS) if isinstance(entry, Mapping) else None
    is_a = pair is not None and bare.shape == pair.A.shape and SCALES in (entry if isinstance(entry, Mapping) else ())
    return empty(bare, len(vectors)) if is_a and isinstance(vectors, Tensor) and vectors.dim() == 2 else {}


def _checked_entry(
    key: Any, entry: Any, expected: dict[str, Tensor], p: nn.Parameter, settings: Settings
) -> dict[str, Tensor]:
    """Return a checked copy of one parameter's state, on the parameter's device and in the expected dtypes."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"checkpoint: the state of parameter {key} is a {type(entry).__name__}, expected a dict")
    if entry.keys() != expected.keys():
        lacking = sorted(map(str, expected.keys() - entry.keys()))
        beyond = sorted(map(str, entry.keys() - expected.keys()))
        raise ValueError(
            f"checkpoint: the state of parameter {key} does not fit curvature={settings.curvature!r}, "
            f"factor_structure={settings.factor_structure!r} (missing: {lacking or 'nothing'}; unexpected: "
            f"{beyond or 'nothing'}); build the optimizer with the options that wrote it, for the same model"
        )
    checked = {}
    for name, value in entry.items():
        tensor = value
        if name == "step" and isinstance(value, (int, float)):
            tensor = torch.tensor(float(value), dtype=torch.float32, device="cpu")
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided):
            raise ValueError(
                f"checkpoint: {name} of parameter {key} is not a dense floating-point tensor; the file is damaged"
            )
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"checkpoint: {name} of parameter {key} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected[name].shape)} for a parameter of shape {tuple(p.shape)}; load the model's weights "
                "first, and check that it is the same model. If ranks changed in the run that wrote it, call "
                "ctr_optim.match_ranks(model, weights) before you load the weights, or pass CTRCallback to the trainer"
            )
        if not bool(tensor.isfinite().all()) or (name in ("step", "exp_avg_sq") and bool((tensor < 0).any())):
            raise ValueError(
                f"checkpoint: {name} of parameter {key} holds NaN, infinite or negative values; the file is damaged"
            )
        checked[name] = tensor.detach().to(p.device, expected[name].dtype, copy=True)
    return checked
