"""CTROptimizer: the conductor. Parameter groups, ``step()``, checkpoints; the maths lives in the other rooms."""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ctr_optim import distributed
from ctr_optim.adapters import find_pairs, find_roots
from ctr_optim.calibration import Probe, gauss_newton_kl, kl_divergence, moved
from ctr_optim.curvature.blocks import Block, TokenScale, factor_state
from ctr_optim.curvature.capture import Taps
from ctr_optim.curvature.factors import STRUCTURES
from ctr_optim.lora import LoRAPair
from ctr_optim.precondition import Stack, initial_state
from ctr_optim.settings import Settings, check_group
from ctr_optim.trust_region import adapted_bound, penalty_gradients, quadratic, scale_within

_COUPLING_GUESS = 30.0  # where the first measurement starts from; language models were seen between 10 and 100


class CTROptimizer(Optimizer):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_kl: float | None = 6e-3,
        kl_schedule: str = "lr",
        calibration_interval: int | None = 20,
        trust_penalty: float = 0.0,
        curvature: str = "kfac",
        factor_structure: str = "diagonal",
        factor_decay: float = 0.95,
        factor_interval: int = 5,
        basis_interval: int = 10,
        damping: float = 0.1,
        max_tokens: int | None = None,
        model: nn.Module | None = None,
        resize: str = "auto",
        loss_reduction: str = "mean",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        self._settings = Settings(
            max_kl, kl_schedule, calibration_interval, trust_penalty, curvature, factor_structure, factor_decay,
            factor_interval, basis_interval, damping, max_tokens, resize, loss_reduction,
        )  # fmt: skip
        self._model = None if model is None else weakref.ref(model)
        self._attached = False
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, foreach=foreach)
        super().__init__(params, defaults)
        self.param_groups[0]["ctr"] = {
            "steps": 0, "skipped": 0, "coupling": None, "base_coupling": None, "max_kl": max_kl, "calibrations": 0,
        }  # fmt: skip
        self._attach()

    # -- the layers ---------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        """Find the LoRA pairs among our parameters and hook them."""
        if self._attached:
            self._finalizer()
        self._attached = True
        parameters = [p for group in self.param_groups for p in group["params"]]
        model = self._model() if self._model is not None else None
        roots = [model] if model is not None else find_roots(parameters)
        ours = {id(p) for p in parameters}
        found = {id(pair.B): pair for root in roots for pair in find_pairs(root, parameters)}
        self.pairs: list[LoRAPair] = [pair for pair in found.values() if id(pair.B) in ours]
        if not self.pairs:
            warnings.warn(
                "CTROptimizer found no LoRA layers that own any of its parameters: it will train them as AdamW does. "
                "Build the optimizer after the adapters have been added to the model, and pass their parameters "
                "(or name the model: CTROptimizer(params, model=model)).",
                stacklevel=3,
            )
        kfac = self._settings.curvature == "kfac"
        self._taps = Taps(self.pairs if kfac else [], self._settings.max_tokens)
        self._probe: Probe | None = None
        if self.pairs and self._settings.curvature != "none" and self._settings.calibration_interval is not None:
            home = next((r for r in roots if _contains(r, self.pairs)), None)
            if home is not None:
                self._probe = Probe(home, [pair.layer for pair in self.pairs])
        self._finalizer = weakref.finalize(self, _close, self._taps, self._probe)
        self._stacks: list[Stack] | None = None
        self._blocks: list[Block] = []
        self._skipped: Tensor | None = None
        self._last: dict[str, Any] = {}
        self._arm()

    def _build_stacks(self) -> None:
        """Stack parameters of one shape, dtype, device and group; see :class:`Stack` for who owns the state."""
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        structure = STRUCTURES[self._settings.factor_structure]
        kfac = self._settings.curvature == "kfac"
        paired: dict[Any, list[int]] = {}
        for index, pair in enumerate(self.pairs if kfac else []):
            groups = tuple(id(group_of.get(id(p))) for p in (pair.A, pair.B))
            key = (pair.A.shape, pair.B.shape, pair.A.dtype, pair.B.dtype, pair.A.device, groups)
            if self.param_groups[0]["foreach"] is False:
                key = (index,)
            paired.setdefault(key, []).append(index)
            for p, rank_dim in ((pair.A, -2), (pair.B, -1)):
                if not self.state[p] and id(p) in group_of:
                    self.state[p].update(initial_state(p, rank_dim))
            for name, tensor in factor_state(pair, structure).items():
                self.state[pair.B].setdefault(name, tensor)
        self._stacks, self._blocks = [], []
        for indices in paired.values():
            pairs = [self.pairs[i] for i in indices]
            group_a = group_of.get(id(pairs[0].A))
            a = None if group_a is None else Stack([p.A for p in pairs], group_a, self.state, -2)
            b = Stack([p.B for p in pairs], group_of[id(pairs[0].B)], self.state, -1)
            self._blocks.append(Block(pairs, indices, a, b, structure))
            self._stacks += [b] if a is None else [a, b]
        in_blocks = {id(p) for stack in self._stacks for p in stack.params}
        others: dict[Any, list[nn.Parameter]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) not in in_blocks and p.requires_grad:
                    others.setdefault((p.shape, p.dtype, p.device, id(group)), []).append(p)
        for params in others.values():
            self._stacks.append(Stack(params, group_of[id(params[0])], self.state, None))

    def _restack(self) -> None:
        self._stacks, self._blocks = None, []

    def _arm(self) -> None:
        """Decide what the coming forward and backward have to record."""
        step, s = self._shared["steps"], self._settings
        self._taps.enabled = bool(self._taps.stages) and _due(step, s.factor_interval)
        if self._taps.enabled:
            if self._stacks is None:
                self._build_stacks()
            for block in self._blocks:
                for index, stage in zip(block.indices, block.stages(), strict=True):
                    self._taps.stages[index] = stage
        if self._probe is not None:
            self._probe.enabled = s.calibration_interval is not None and _due(step, s.calibration_interval)

    # -- the step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return loss
        finite = self._check(grads)
        if self._stacks is None:
            self._build_stacks()
        assert self._stacks is not None
        if self._taps.enabled:
            self._commit(finite)
        if self._blocks and _due(self._shared["steps"], self._settings.basis_interval):
            for block in self._blocks:
                block.refresh_bases()
        deltas = self._directions(finite)
        if self._blocks:
            self._constrain(deltas, finite)
        for stack, delta in deltas.items():
            stack.move_(delta)
        if closure is not None and self._settings.kl_schedule == "adaptive" and self._last:
            self._adapt(closure, loss, deltas)
        self._shared["steps"] += 1
        self._arm()
        return loss

    def _check(self, grads: list[Tensor]) -> Tensor:
        """``()`` whether every gradient is finite; counts and tells where not, without waiting for the device."""
        for g in grads:
            if g.is_sparse or g.is_complex():
                kind = "sparse" if g.is_sparse else "complex"
                raise TypeError(f"CTROptimizer got a {kind} gradient of shape {tuple(g.shape)}; expected dense and real")
        by_device: dict[torch.device, list[Tensor]] = {}
        for g in grads:
            by_device.setdefault(g.device, []).append(g)
        home = grads[0].device
        finite = torch.stack(
            [torch.isfinite(torch.stack(torch._foreach_norm(gs, math.inf))).all().to(home) for gs in by_device.values()]
        ).all()
        self._skipped = (~finite).long() if self._skipped is None else self._skipped + ~finite
        if home.type == "cpu" and not finite:
            _warn_skipped()
        return finite

    def _commit(self, finite: Tensor) -> None:
        """Fold what the taps staged into the factors."""
        staged = [t for block in self._blocks for t in block.staged]
        world = distributed.add_up(staged)
        tokens = torch.stack([block.loss_tokens() for block in self._blocks]).amin()
        seen = torch.isfinite(tokens) & finite
        tokens = torch.where(seen, tokens, 1.0)
        grad = 1.0 / (_grad_scale() * world)
        scale = TokenScale(tokens, tokens * grad if self._settings.loss_reduction == "mean" else tokens.new_tensor(grad))
        for block in self._blocks:
            block.commit(scale, self._settings.factor_decay, seen)

    def _directions(self, finite: Tensor) -> dict[Stack, Tensor]:
        deltas = {}
        assert self._stacks is not None
        for stack in self._stacks:
            found = stack.direction(finite)
            if found is not None:
                deltas[stack] = found[0]
        weight = self._settings.trust_penalty
        for block in self._blocks if weight else ():
            a, b = torch.stack([p.A.detach() for p in block.pairs]), block.b.values()
            for stack, gradient in zip((block.a, block.b), penalty_gradients(a, b, block.H, block.D, block.C, block.S), strict=True):
                if stack in deltas:
                    deltas[stack] -= stack.group["lr"] * weight * gradient
        return deltas

    # -- what users read and save -------------------------------------------------------------------------------

    @property
    def _shared(self) -> dict[str, Any]:
        """Numbers of the optimizer as a whole; kept in the first group, where every kind of checkpoint finds them."""
        return self.param_groups[0]["ctr"]

    @torch.no_grad()
    def metrics(self) -> dict[str, Any]:
        """What the last step did, as plain floats; waits for the device.

        Keys: ``trust/predicted_kl`` and ``trust/max_kl`` (nats per token), ``trust/scale`` (factor applied to the step),
        ``trust/coupling`` and ``trust/source``, ``kl_from_base`` (nats per token) and ``kl_from_base/layer``, ``ranks``,
        ``skipped_steps``.
        """
        if self._stacks is None:
            self._build_stacks()
        shared, last = self._shared, self._last
        if self._skipped is not None and int(self._skipped):
            shared["skipped"] += int(self._skipped)
            self._skipped = None
            _warn_skipped()
        names = [pair.name for block in self._blocks for pair in block.pairs]
        shares = torch.cat([block.kl_from_base() for block in self._blocks]).tolist() if names else []
        factor = shared["base_coupling"] or self._coupling
        by_layer = {name: factor * share for name, share in zip(names, shares, strict=True)}
        return {
            "trust/predicted_kl": float(last["predicted"]) if last else 0.0,
            "trust/max_kl": last.get("bound"),
            "trust/scale": float(last["scale"]) if last else 1.0,
            "trust/coupling": self._coupling,
            "trust/source": self._source(),
            "kl_from_base": sum(by_layer.values()),
            "kl_from_base/layer": by_layer,
            "ranks": {pair.name: pair.rank for pair in self.pairs},
            "skipped_steps": shared["skipped"],
        }

    def _source(self) -> str:
        """Where the coupling comes from."""
        if self._settings.calibration_interval is None:
            return "block-diagonal"
        if self._shared["coupling"] is not None:
            return "measured"
        refused = self._probe.refused if self._probe is not None else "no single model holds all the layers"
        return f"assumed ({refused or 'not measured yet'})"

    def close(self) -> None:
        """Remove every hook from the model; the optimizer then takes steps with the factors that it has."""
        self._finalizer()
        self._taps.enabled = False
        self._probe = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, exactly: unlike torch's, nothing is cast to the parameters' dtype.

        Raises:
            ValueError: if it belongs to other parameters; nothing is loaded then.
        """
        saved = self._check_checkpoint(state_dict)
        super().load_state_dict(state_dict)
        for p, entry in saved.items():
            self.state[p] = {
                key: value.detach().to(device=p.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in entry.items()
            }
        self._restack()
        self._arm()

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> dict[nn.Parameter, dict[str, Any]]:
        groups = state_dict.get("param_groups", [])
        sizes, ours = [len(g["params"]) for g in groups], [len(g["params"]) for g in self.param_groups]
        if sizes != ours:
            raise ValueError(f"checkpoint: got parameter groups of {sizes} parameters, expected {ours}")
        saved = {}
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            for p, key in zip(mine["params"], theirs["params"], strict=True):
                entry = state_dict["state"].get(key)
                if entry is None:
                    continue
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in entry or entry[name].shape != p.shape:
                        got = tuple(entry[name].shape) if name in entry else None
                        raise ValueError(
                            f"checkpoint: {name} of parameter {key} has shape {got}, the parameter {tuple(p.shape)}; "
                            "load the model's weights first (ranks may have changed), and check that it is the same model"
                        )
                saved[p] = entry
        return saved

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; what the taps staged goes with the gradients (a GradScaler may have skipped ``step()``)."""
        super().zero_grad(set_to_none)
        for block in self._blocks:
            block.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; LoRA layers in the new group are found and hooked."""
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])
        if self._attached:
            self._attach()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_settings": self._settings}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_settings" not in state:  # torch's load_state_dict passes here too: the layers are hooked already
            return
        self._model = None
        self._attached = False
        self._attach()


def _due(step: int, interval: int) -> bool:
    """Every ``interval`` steps; more often at first, when everything still changes fast: at steps 0, 1, 2, 4, 8, ..."""
    return step % interval == 0 or (step < interval and step & (step - 1) == 0)


def _contains(root: nn.Module, pairs: list[LoRAPair]) -> bool:
    inside = {id(m) for m in root.modules()}
    return all(id(pair.layer) in inside for pair in pairs)


def _close(taps: Taps, probe: Probe | None) -> None:
    taps.close()
    if probe is not None:
        probe.close()


def _warn_skipped() -> None:
    warnings.warn(
        "CTROptimizer skipped a step: a gradient was not finite. Parameters, moments and factors are untouched; "
        "metrics()['skipped_steps'] counts such steps.",
        stacklevel=4,
    )


def _grad_scale() -> float | Tensor:
    """The loss scale of the GradScaler that called this step, or 1.

    The scaler unscales ``p.grad`` but cannot reach what the taps staged, and hides its scale from optimizers when the
    user unscaled early to clip. It is the caller of ``step()``, a few frames up.
    """
    frame = sys._getframe(2)
    for _ in range(10):
        # f_locals of the user's own frames would keep their variables alive: look into the scaler's alone
        scaler = frame.f_locals.get("self") if frame.f_globals.get("__name__") == "torch.amp.grad_scaler" else None
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler._scale if scaler._scale is not None else 1.0
        if frame.f_back is None:
            break
        frame = frame.f_back
    return 1.0
