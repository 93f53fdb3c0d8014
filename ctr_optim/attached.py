"""The optimizer's LoRA layers, hooks, parameter stacks and checkpoint numbers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.checkpoint.matching import resize_on_load
from ctr_optim.curvature.blocks import Block, drop_sketches
from ctr_optim.curvature.defaults import CurvatureBase
from ctr_optim.curvature.kfac import KFAC
from ctr_optim.curvature.registry import CURVATURES
from ctr_optim.direction.fused import Fused
from ctr_optim.direction.layout import Layout, lay_out, parameters_of, same_parameters
from ctr_optim.direction.stack import Stack
from ctr_optim.holdout import Holdout, Judge
from ctr_optim.model import checks
from ctr_optim.model.pair import LoRAPair
from ctr_optim.model.trained import Trained
from ctr_optim.numbered import Numbered
from ctr_optim.ranks.controller import RankController, RankState
from ctr_optim.ranks.scheduler import RankScheduler
from ctr_optim.retention.budget import Budget, check_budget
from ctr_optim.retention.meter import meter_of
from ctr_optim.retention.source import Retained
from ctr_optim.runtime import distributed
from ctr_optim.runtime.counters import Counters
from ctr_optim.runtime.devices import together
from ctr_optim.runtime.hooks import Hook, in_backward, weakly
from ctr_optim.runtime.messages import Once, warn_unbounded
from ctr_optim.runtime.watch import Watch
from ctr_optim.settings import EVERYDAY_RATE, LEARNING_RATE, Settings, chosen, keeps_shapes
from ctr_optim.trust_region.bound import BOUNDS, Bound
from ctr_optim.trust_region.coupling import Coupling
from ctr_optim.trust_region.loss_scale import LossScale
from ctr_optim.trust_region.others import Others
from ctr_optim.trust_region.probe import Probe
from ctr_optim.trust_region.region import TrustRegion


class Attached(Numbered):
    """Base class that finds the LoRA layers of the parameters, hooks them, and stacks parameters with their state.

    :class:`~ctr_optim.CTROptimizer` adds the step and the public methods.
    """

    _finalizer: weakref.finalize
    _settings: Settings
    _model: weakref.ref[nn.Module] | None
    _attached: bool
    _bound: Bound
    _scheduler: RankScheduler | None
    _retained: Retained
    _kl_budget: float | None
    _holdout: Holdout | None

    def _attach(self, numbers: Mapping[str, Any] | None = None) -> None:
        """Find the LoRA layers that own the parameters, and hook them.

        Args:
            numbers: checkpoint numbers to restore; None: keep the current ones, if there are any.
        """
        if self._attached:
            numbers = self._numbers()
            self._finalizer()
        self._attached = True
        self._once = getattr(self, "_once", Once())
        model = self._model() if self._model is not None else None
        self._held = parameters_of(self.param_groups)
        self._trained = Trained(self._held, model, self._rerunning)
        self.pairs = self._trained.pairs
        self._ranks = self._rank_controller()
        home = self._trained.home()
        measured = self._settings.calibration_interval is not None and self._kind.measures
        wanted = home is not None and (measured or self._kind.reruns)
        others = Others() if measured and self._bound.needs_others else None
        loss_scale = LossScale() if home is not None and measured and self._averages_gradients else None
        probe = None
        if home is not None and wanted:
            probe = Probe(home, self._trained.owners(), loss_scale=loss_scale, others=others is not None)
        self._curvature = self._kind.build(self.pairs, self._settings, probe)
        interval = self._settings.calibration_interval
        coupling = Coupling(probe if measured else None, self._curvature.quiet, interval, others)
        before: TrustRegion | None = getattr(self, "_trust", None)
        self._trust = TrustRegion(self._bound, coupling, loss_scale)
        if before is not None:  # A parameter group was added; metrics() must still describe the last step.
            self._trust.predicted, self._trust.scale, self._trust.limit = before.predicted, before.scale, before.limit
        self._budget = self._budget_of(home, coupling)
        self._judge = None if self._holdout is None else Judge(self._holdout, weakly(self._home), coupling.quiet)
        self._go_on(numbers or {})
        handles = self._hook_forwards()
        for pair in self.pairs:
            moves = self._ranks is not None
            handles += resize_on_load(pair, self._settings.resize, weakly(self._rank_loaded), moves)
        self._finalizer = weakref.finalize(self, _detach, self._curvature.closer(), probe, handles)
        self._layout: Layout | None = None
        self._fused = Fused(())
        self._skipped: Tensor | None = None
        self._watch = Watch()
        self._arm()

    def _budget_of(self, home: nn.Module | None, coupling: Coupling) -> Budget | None:
        """Return the bound on the KL from the base model; None without ``kl_budget``."""
        if self._kl_budget is None:
            return None
        unmeasured = None if self._kind.measures else self._settings.curvature
        check_budget(self._kl_budget, self.pairs, self._held, unmeasured)
        text = self._retained.text if self._retained.has_text else None
        meter = meter_of(home, self.pairs, text, coupling.prober, coupling.quiet)
        return Budget(float(self._kl_budget), meter, self.pairs)

    @property
    def _kind(self) -> type[CurvatureBase]:
        """The curvature class that the options name."""
        return CURVATURES[self._settings.curvature]

    @property
    def _averages_gradients(self) -> bool:
        """Whether the metric averages squared gradients of a mean loss, so that it can remove the loss's scale."""
        return issubclass(self._kind, KFAC) and bool(self.pairs) and self._settings.loss_reduction == "mean"

    @property
    def _rerunning(self) -> str | None:
        """Name of the curvature if it runs its own backward passes, else None."""
        return self._settings.curvature if self._kind.reruns else None

    @property
    def _bounded(self) -> bool:
        """Whether the options ask for a trust region."""
        return self._settings.max_kl is not None and self._kind.measures

    def _home(self) -> nn.Module:
        """Return the module that contains all parameters, or else the largest root module."""
        return self._trained.home() or self._trained.roots[0]

    def _hook_forwards(self) -> list[Any]:
        """Register hooks that call :meth:`_forward_begins` before every training forward pass."""
        begins = partial(_forward_begins, weakly(self._forward_begins))
        return [
            root.register_forward_pre_hook(Hook(begins, id(root)), with_kwargs=True) for root in self._trained.roots
        ]

    def _rank_controller(self) -> RankController | None:
        if self._scheduler is None:
            return None
        movable = self.pairs if issubclass(self._kind, KFAC) else []
        checks.check_ranks_can_move(movable, self._trained.roots, self._settings)
        listeners = self._ranks.listeners if self._ranks is not None else []
        return RankController(
            self._scheduler, self._settings.damping, self.pairs, listeners, self._rank_state, self._counters
        )

    def _stack(self) -> list[Stack]:
        """Return the stacks of all trained parameters; rebuild them if their state was replaced."""
        self._follow()
        if self._layout is None:
            distributed.reshard(self._trained.fsdp)  # A forward pass may have left gathered parameters in the modules.
            kfac = isinstance(self._curvature, KFAC)
            pairs = self.pairs if kfac else []
            self._layout = lay_out(pairs, self.param_groups, self.state, self._prepare)
            self._curvature.bind(self._layout.pairs, self._layout.others)
            self._fused = Fused(self._fusible())
        return self._layout.stacks

    def _prepare(self, state: Any, kept: list[nn.Parameter]) -> None:
        """Add the tensors of curvature and retention to the parameters' state."""
        self._curvature.prepare(state, kept)
        self._retained.prepare(state, self.pairs)
        if self._average is not None:
            self._average.prepare(kept, state)

    def _retain(self) -> None:
        """Measure the retained text once, and start all layers with ``B = 0`` in its coordinates.

        This happens before the first training forward pass, when the model is on its final device. A model sharded by
        FSDP2 cannot start a nested forward pass, so it is measured at construction or at the first step.
        """
        if not self._retained.pending:
            return
        self._follow()
        with torch.no_grad():
            self._retained.measure(self._home())
            distributed.reshard(self._trained.fsdp)
            self._retained.start_([pair for pair in self.pairs if id(pair.A) in map(id, self._held)], self.state)
        self._restack()
        self._arm()

    def _forget_shapes(self) -> None:
        """Drop stored weights and gradients after a rank event: the parameters may have other shapes."""
        if self._judge is not None:
            self._judge.forget(self.state)
        if self._budget is not None:
            self._budget.forget(self.state)
        if self._average is not None:
            self._average.forget(self.state)
        self._restack()

    def _restack(self) -> None:
        """Drop the stacks after their shared state was replaced."""
        self._layout, self._fused = None, Fused(())
        self._curvature.unbind()

    def _fusible(self) -> list[Block]:
        """Return the blocks that Triton kernels can handle: all layers have factors, and ``trust_penalty`` is 0."""
        kfac = self._curvature
        usable = isinstance(kfac, KFAC) and kfac.blocks and self._settings.trust_penalty == 0 and kfac.complete
        return self._blocks() if usable else []

    def _blocks(self) -> list[Block]:
        return self._curvature.blocks if isinstance(self._curvature, KFAC) else []

    @property
    def blocks(self) -> list[Block]:
        """LoRA pairs stacked by shape, with their factors."""
        self._stack()
        return self._blocks()

    def _follow(self) -> None:
        """Adopt the sharded parameters that Accelerate puts into the parameter groups.

        Modules, hooks and statistics stay valid. Other replaced parameters make ``step()`` raise an error.
        """
        parameters = parameters_of(self.param_groups)
        if same_parameters(parameters, self._held):
            return
        fsdp = distributed.fsdp_modules(self._trained.roots)
        distributed.reshard(fsdp)
        ours = {id(p) for p in parameters}
        whole = (
            all(id(pair.B) in ours for pair in self.pairs)
            if self.pairs
            else any(map(distributed.is_sharded, parameters))
        )
        if self._counters.steps or not whole:
            checks.check_not_replaced(parameters, self._held)
            return
        checks.check_sharding(parameters, self._rerunning)
        for p in self._held:
            self.state.pop(p, None)
        self._held, self._trained.fsdp, self._layout = parameters, fsdp, None
        self._stack()

    def _arm(self) -> None:
        """Set which statistics the next forward and backward passes record."""
        step, curvature = self._counters.steps, self._curvature
        if isinstance(curvature, KFAC):
            curvature.sketching = self._ranks is not None and self._ranks.scheduler.sketches(step) and curvature.able
            if curvature.sketching and self._ranks is not None:
                self._open_sketch(self._ranks.scheduler.sketch_rank)
        if curvature.due(step):
            self._stack()
        curvature.arm(step)
        budget = self._budget
        self._budget_due = budget is not None and budget.due(self._length())
        self._trust.coupling.arm(step, self._budget_due and budget is not None and not budget.meter.on_text)

    def open_sketch(self, rank: int) -> None:
        """Start the sketch of the whitened gradient for ``rank`` candidate directions per layer, if none is open."""
        if self._open_sketch(rank):
            self._arm()

    def _open_sketch(self, rank: int) -> bool:
        assert isinstance(self._curvature, KFAC)
        self._stack()
        opened = self._curvature.open_sketch(rank, self.state)
        if opened and self._ranks is not None:
            self._ranks.begin_sketch()
        return opened

    def _rank_loaded(self, pair: LoRAPair, resized: bool) -> None:
        """React to a model that loads a pair's weights; drop the pair's state if the weights have another shape."""
        if self._ranks is not None:
            self._ranks.forget_ranks()
        if not resized:
            return
        for p in (pair.A, pair.B):
            self.state.pop(p, None)
        drop_sketches(self.state, self.pairs)  # All layers must restart their sketches together.
        self._forget_shapes()
        self._arm()

    def _forward_begins(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Prepare for a training forward pass: move the state to the model's device, drop outdated statistics."""
        if self._average is not None and self._average.loaded and not self._trained.fsdp:
            self._use_training()
        if self._bound.needs_rows:
            self._trust.rows.look(args, kwargs)
        if not self._trained.fsdp:
            self._retain()
        self._curvature.follow_devices(self.state)
        self._follow_devices()
        self._forget_dropped()

    @torch.no_grad()
    def _use_training(self) -> None:
        """Let the parameters hold the training weights, if they hold the average."""
        if self._average is not None and self._average.in_use:
            distributed.reshard(self._trained.fsdp)
            self._average.leave(self._held, self.state)

    def _follow_devices(self) -> None:
        """Move the state of parameters outside LoRA layers to their current device."""
        for stack in self._layout.others if self._layout is not None else ():
            stack.to_(stack.params[0].device, self.state)

    def _forget_dropped(self) -> None:
        """Drop staged statistics if all gradients are None or zero: ``model.zero_grad()`` notifies no optimizer."""
        kfac = self._curvature
        staged = isinstance(kfac, KFAC) and kfac.taps.enabled
        if not (staged or self._trust.observing) or self._trained.fsdp:
            return  # FSDP2 accumulates gradients outside p.grad.
        if not same_parameters(parameters_of(self.param_groups), self._held):
            return
        grads = [p.grad for pair in self.pairs for p in (pair.A, pair.B) if p.grad is not None]
        unless = (together(torch._foreach_norm(grads)) != 0).any() if grads else None
        kfac.forget(unless)
        if not in_backward():  # Checkpointing recomputes a pass after the logits' gradients were observed.
            self._trust.forget(unless)

    def _fall_back(self, reason: str) -> None:
        """Use AdamW's usual learning rate: no rate was given, and no trust region bounds the step."""
        self.defaults["lr"] = EVERYDAY_RATE
        for group in self.param_groups:
            group["lr"] = EVERYDAY_RATE if group["lr"] == LEARNING_RATE else group["lr"]
        warn_unbounded(reason, EVERYDAY_RATE)

    def _judged(self, first: bool = False) -> None:
        """Measure the held-out loss if it is due: before the first step, and at the hold-out's intervals."""
        judge, steps = self._judge, self._counters.steps
        if judge is None or (steps != 0 if first else not judge.holdout.due(steps)):
            return
        distributed.reshard(self._trained.fsdp)
        if not judge.look(steps, self._held, self.state):
            return
        if self._budget is not None:
            self._budget.doubt()
        if self._average is not None:  # It contains the abandoned weights.
            self._average.state.averaged_steps = 0

    def _length(self) -> float:
        """Return a step's length, the square root of a KL in nats per token: its bound, or else the last prediction."""
        limit = self._bound.state.max_kl if self._trust.limit is None else self._trust.limit
        last = None if self._budget is None else self._budget.state.budget_length
        if limit is not None and self._trust.limit is None and last is not None:
            return last  # The last step was before the checkpoint.
        return math.sqrt(float(self._trust.predicted if limit is None else limit))

    def _masked(self) -> bool:
        """Return whether layers keep their shapes when ranks change."""
        return keeps_shapes(self._settings.resize, lambda: checks.shapes_must_stay(self._trained.roots))

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            "_settings": self._settings,
            "_scheduler": self._scheduler,
            "_retained": self._retained,
            "_kl_budget": self._kl_budget,
            "_holdout": self._holdout,
            "_average": self._average,
            "_carried": self._numbers(),
        }
        return {**super().__getstate__(), **own}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_settings" not in state:  # load_state_dict() calls this method too; the layers then have their hooks.
            return
        self._model, self._ranks, self._attached = None, None, False
        self._counters, self._rank_state = Counters(), RankState()
        self._bound = chosen("kl_schedule", self._settings.kl_schedule, BOUNDS)(self._settings.max_kl)
        self._bound.averaged = self._average is not None
        self._attach(self.__dict__.pop("_carried"))


def _detach(close: Callable[[], None], probe: Probe | None, handles: Iterable[Any]) -> None:
    """Remove every hook from the model."""
    close()
    for handle in handles:
        handle.remove()
    if probe is not None:
        probe.close()


def _forward_begins(begins: Callable[..., Any], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call ``begins`` before a training forward pass in eager mode.

    The hook is on the root module, because activation checkpointing re-runs submodules during backward.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        begins(args, kwargs)
