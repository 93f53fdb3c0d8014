"""CTROptimizer: the conductor. Parameter groups, ``step()``, checkpoints; the maths lives in the other rooms."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ctr_optim.checkpoint.matching import resize_on_load
from ctr_optim.checkpoint.validation import checked
from ctr_optim.curvature.kfac import Block, drop_sketches
from ctr_optim.direction.gradients import all_finite
from ctr_optim.direction.stack import Stack
from ctr_optim.layers import Layers
from ctr_optim.metrics import metrics_of
from ctr_optim.model import checks
from ctr_optim.model.pair import LoRAPair
from ctr_optim.ranks.controller import RankController
from ctr_optim.ranks.events import RankEvent
from ctr_optim.ranks.scheduler import RankScheduler
from ctr_optim.runtime import distributed
from ctr_optim.runtime.devices import exact
from ctr_optim.runtime.hooks import weakly
from ctr_optim.runtime.messages import warn_skipped
from ctr_optim.runtime.watch import Watch
from ctr_optim.settings import Settings, calibration_due, check_group, due
from ctr_optim.trust_region.coupling import TrustRegion, initial_shared


class CTROptimizer(Optimizer):
    r"""Adam in the K-FAC eigenbasis of LoRA layers, inside a trust region in nats per token.

    Reconstructed from the abstract of CTR-LoRA (arXiv 2510.15962). For each layer :math:`y = W_0 x + s B A x`, hooks
    keep :math:`H = E[h h^T]`, :math:`D = E[(B^T g)(B^T g)^T]` and the diagonals of :math:`C = E[x x^T]` and
    :math:`S = E[g g^T]` (:math:`h = A x`, g the per-token gradient at B's output). A step is

    .. math::
        \Delta_A = -lr\, Q_D\, Adam(Q_D^T g_A), \quad \Delta_B = -lr\, Adam(g_B Q_H)\, Q_H^T, \quad
        \Delta \leftarrow \Delta \min(1, \sqrt{max\_kl / (\kappa q / 2)})

    with q the step's quadratic form in :math:`C \otimes D, H \otimes S` and their cross term, weight decay included,
    and :math:`\kappa` measured on the model. Parameters of no LoRA layer are trained as by AdamW, their step scaled
    alike.

    Args:
        params: parameters or groups, as in torch; the LoRA layers that own them are found by themselves.
        lr: above a threshold, an eighth of the default, the bound decides the step's length and lr nothing: leave it,
            schedule it. Without a bound, choose it as for AdamW.
        betas, eps, weight_decay: as in :class:`torch.optim.AdamW`, but for a shorter memory of gradients: the bound
            sets how long a step is, and old gradients only turn it.
        max_kl: bound on the predicted KL divergence per token of one step, in nats; None for no trust region.
        kl_schedule: ``"lr"``: the bound follows ``(lr / peak lr)^2``, the peak being the largest lr seen or left by a
            scheduler as ``initial_lr``; ``"constant"``; ``"adaptive"``: from predicted and actual reduction of the
            loss, needs ``step(closure)``, which is called twice.
        calibration_interval: most steps between measurements of kappa, which come at steps 0, 1, 4, 9, 16, ... before;
            None: kappa is 1, the plain metric.
        trust_penalty: weight of the decoupled penalty on ``sum tr(D H)``, the adapter's way from the base model.
        curvature: ``"kfac"``; ``"hutchinson"``: the Hessian's diagonal, for models that return their loss; ``"none"``.
        factor_structure: of C and S: ``"diagonal"``, ``"lowrank"`` or ``"dense"``.
        factor_decay, factor_interval, basis_interval: moving average, and steps between updates of factors and bases.
        damping: of whitening, relative to the mean eigenvalue.
        max_tokens: tokens a layer looks at in one forward, evenly spaced; None for all.
        rank_scheduler: a :class:`RankScheduler`, or a dict of its arguments: ranks move.
        model: the model, where it should not be searched for.
        resize: ``"physical"``: a layer whose rank moves gets weights of another shape. ``"masked"``: layers keep the
            shapes that they were allocated with, and directions that they do not use are zero. ``"auto"``: physical in
            one eager process, masked in several and in compiled models.
        loss_reduction: ``"mean"`` or ``"sum"`` over tokens, whichever the loss is.
        maximize: as in torch.
        foreach: None: the fastest that applies (Triton kernels on a GPU); True: torch operations on stacked layers;
            False: layer by layer.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what was expected.
    """

    _finalizer: weakref.finalize

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 8e-2,
        betas: tuple[float, float] = (0.8, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_kl: float | None = 0.1,
        kl_schedule: str = "lr",
        calibration_interval: int | None = 50,
        trust_penalty: float = 0.0,
        curvature: str = "kfac",
        factor_structure: str = "diagonal",
        factor_decay: float = 0.95,
        factor_interval: int = 10,
        basis_interval: int = 10,
        damping: float = 0.1,
        max_tokens: int | None = 128,
        rank_scheduler: RankScheduler | Mapping[str, Any] | None = None,
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
        self._ranks: RankController | None = None
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, foreach=foreach)
        super().__init__(params, defaults)
        counters = dict.fromkeys(("steps", "skipped", "sketched", "hessians", "failed"), 0)
        self.param_groups[0]["ctr"] = counters | initial_shared(self._settings)
        self._scheduler = None if rank_scheduler is None else RankScheduler.of(rank_scheduler)
        self._attach()

    # -- the layers ---------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        """Find the LoRA pairs among our parameters and hook them."""
        if self._attached:
            self._finalizer()
        self._attached = True
        model = self._model() if self._model is not None else None
        self._layers = Layers(self.param_groups, model, self._settings)
        self.pairs = self._layers.pairs
        ranks = self._rank_controller()
        attachment = self._layers.hook(weakly(self._forward_begins))
        self._finalizer = weakref.finalize(self, attachment.close)
        before: TrustRegion | None = getattr(self, "_trust", None)
        self._trust = TrustRegion(self._settings, self._layers.probe, self._layers.taps)
        if before is not None:  # a new group: what the last step did stays told
            self._trust.predicted, self._trust.scale, self._trust.bound = before.predicted, before.scale, before.bound
        for pair in self.pairs if ranks is not None else ():
            attachment.handles += resize_on_load(pair, self._settings.resize, weakly(self._rank_loaded))
        self._ranks = ranks
        self._skipped: Tensor | None = None
        self._watch = Watch()
        self._arm()

    def _rank_controller(self) -> RankController | None:
        if self._scheduler is None:
            return None
        checks.check_ranks_can_move(self.pairs, self._layers.roots, self._settings)
        listeners = self._ranks.listeners if self._ranks is not None else []
        return RankController(self._scheduler, self._settings.damping, self.pairs, listeners)

    def _stack(self) -> list[Stack]:
        """Everything that trains, by shape."""
        return self._layers.stack(self.param_groups, self.state)

    def _arm(self) -> None:
        """Decide what the coming forward and backward have to record."""
        step, s, taps = self._shared["steps"], self._settings, self._layers.taps
        able = bool(taps.stages)  # not without layers, not once closed
        sketch = able and self._ranks is not None and self._ranks.scheduler.sketches(step)
        if sketch and self._ranks is not None:
            self._layers.open_sketch(self._ranks.scheduler.sketch_rank, self.param_groups, self.state)
        taps.enabled = able and (sketch or due(step, s.factor_interval))
        if taps.enabled:
            self._stack()
            self._layers.stage()
        if self._layers.probe is not None:
            self._layers.probe.enabled = calibration_due(step, s.calibration_interval)

    def open_sketch(self, rank: int) -> None:
        """Begin to sketch the whitened gradient for ``rank`` candidate directions a layer, unless begun already."""
        if self._layers.open_sketch(rank, self.param_groups, self.state):
            self._arm()

    @property
    def blocks(self) -> list[Block]:
        """LoRA pairs stacked by shape, with their factors."""
        self._stack()
        return self._layers.blocks

    # -- the step -----------------------------------------------------------------------------------------------

    @_disable_dynamo  # as torch's own: what is compiled around a step breaks its graph here
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. A step with a gradient that is not finite changes nothing, and is counted.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            the closure's loss.
        """
        checks.check_outside_backward()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            self._watch.no_gradient(self.steps)
            return loss
        stacks, fused = self._stack(), self._layers.fused
        found = fused.look()
        finite = all_finite(self.param_groups, fused.params if found is not None else (), found)
        skip = (~finite).long()
        self._skipped = skip if self._skipped is None else self._skipped + skip.to(self._skipped.device)
        with exact(stack.device for stack in stacks):
            deltas, forms = self._directions(stacks, finite, found is not None)
        scale = None
        if forms is not None:
            scale = self._trust.constrain(deltas, *forms, self._layers.blocks, self.param_groups, self._shared)
        moved = fused.move_(deltas, scale) if found is not None and scale is not None else []
        for stack, delta in deltas.items():
            if stack not in moved:
                stack.move_(delta, scale)
        if closure is not None and self._settings.kl_schedule == "adaptive" and forms is not None:
            self._trust.adapt(closure, loss, deltas, self._shared)
        self._shared["steps"] += 1
        if scale is not None:
            self._watch.stepped(self.steps, self.param_groups, self._trust.predicted, scale, self._trust.bound)
        self._reallocate()
        self._arm()
        return loss

    def _directions(
        self, stacks: list[Stack], finite: Tensor, fused: bool
    ) -> tuple[dict[Stack, Tensor], tuple[Tensor, Tensor] | None]:
        """Every stack's step, before the trust region: factors and bases brought up to date, then Adam.

        And ``()`` their quadratic form in the chosen curvature and their slope; None where there is no curvature.
        """
        layers = self._layers
        layers.follow_devices(self.state)
        if layers.taps.enabled:
            layers.commit(finite, (self._settings, self._scheduler))
            self._shared["sketched"] += 1
        layers.hold()
        if due(self._shared["steps"], self._settings.basis_interval):
            layers.renew_bases(self._shared)
        deltas, known = layers.fused.directions(finite) if fused else ({}, None)
        rest = {stack: stack.direction(finite) for stack in stacks if stack not in deltas}
        deltas.update({stack: delta for stack, delta in rest.items() if delta is not None})
        if not deltas:
            raise RuntimeError(checks.REPLACED)
        layers.penalize_(deltas, finite)
        return deltas, layers.forms(deltas, known, finite, self._shared)

    def _reallocate(self) -> None:
        """Hold a rank event where one is due."""
        if self._ranks is None:
            return
        checks.check_ranks_belong_to_us(self.param_groups)
        if self._shared["steps"] != self._ranks.scheduler.next_event(self._shared["steps"]):
            return
        if not self._layers.taps.stages:  # closed: nothing new is known of the layers
            return
        masked = self._masked()
        if not masked:
            checks.check_single_process()
        blocks = self.blocks
        distributed.reshard(self._layers.fsdp)
        with exact(block.H.device for block in blocks):
            self._ranks.event(blocks, self.state, self._shared, masked)
        self._layers.restack()

    def _masked(self) -> bool:
        """Whether layers keep their shapes when ranks move."""
        if self._settings.resize != "auto":
            return self._settings.resize == "masked"
        return checks.shapes_must_stay(self._layers.roots)

    # -- what users read and save -------------------------------------------------------------------------------

    @property
    def _shared(self) -> dict[str, Any]:
        """Numbers of the optimizer as a whole; kept in the first group, where every kind of checkpoint finds them."""
        shared: dict[str, Any] = self.param_groups[0]["ctr"]
        return shared

    @property
    def steps(self) -> int:
        """Steps taken."""
        return int(self._shared["steps"])

    @property
    def ranks(self) -> dict[str, int]:
        """Directions in use, by layer; may wait for the device (and processes) after a checkpoint was loaded."""
        if self._ranks is not None:
            distributed.reshard(self._layers.fsdp)
            return dict(self._ranks.ranks)
        return {pair.name: pair.rank for pair in self.pairs}

    @property
    def rank_scheduler(self) -> RankScheduler | None:
        """The scheduler of the ranks; another one may take its place during training."""
        return self._scheduler

    @rank_scheduler.setter
    def rank_scheduler(self, scheduler: RankScheduler) -> None:
        if self._ranks is None:
            raise ValueError("rank_scheduler: this optimizer was built without one; pass it to CTROptimizer")
        self._scheduler = self._ranks.scheduler = scheduler
        if not scheduler.sketches(self.steps):
            drop_sketches(self.state, self.pairs)
            self._layers.restack()
        self._arm()

    @torch.no_grad()
    def metrics(self) -> dict[str, Any]:
        """What the last step did, as plain floats; waits for the device.

        Keys: ``trust/predicted_kl`` and ``trust/max_kl`` (nats per token), ``trust/scale`` (factor applied to the
        step), ``trust/coupling`` and ``trust/source``, ``kl_from_base`` (nats per token; an estimate, right in
        proportion between layers) and ``kl_from_base/layer``, ``ranks``, ``utility`` (nats per token, at the last rank
        event), ``skipped_steps``, ``failed_decompositions`` (where one failed, layers kept their bases, or ranks).
        """
        self._count_skipped()
        utility = self._ranks.utility if self._ranks is not None else {}
        return metrics_of(self.blocks, self._trust, self._shared, self.ranks, utility)

    def on_rank_event(self, listener: Callable[[RankEvent], None]) -> None:
        """Call ``listener`` with every :class:`RankEvent`, in the order of the layers' names."""
        if self._ranks is None:
            raise ValueError("on_rank_event: this optimizer has no rank_scheduler, and will emit no events")
        self._ranks.listeners.append(listener)

    def close(self) -> None:
        """Remove every hook from the model; the optimizer then takes steps with the factors and ranks that it has."""
        self._finalizer()
        self._layers.probe = self._trust.probe = None
        drop_sketches(self.state, self.pairs)
        self._layers.restack()

    def _count_skipped(self) -> None:
        """Move the count of skipped steps from the device to the state; waits for the device."""
        skipped, self._skipped = int(self._skipped or 0), None
        if skipped:
            self._shared["skipped"] += skipped
            warn_skipped()

    def state_dict(self) -> dict[str, Any]:
        """As in torch: tensors, numbers and lists only, fit for ``torch.load(..., weights_only=True)``."""
        self._count_skipped()
        self._layers.follow(self.param_groups, self.state)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, exactly: unlike torch's, nothing is cast to the parameters' dtype.

        Raises:
            ValueError: if it belongs to other parameters, or is damaged; nothing is loaded then.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._layers.follow(self.param_groups, self.state)
        distributed.reshard(self._layers.fsdp)  # the layers hold the parameters of our groups again
        state, groups = checked(state_dict, self.param_groups, self.pairs, self._settings)
        self.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        self._layers.restack()
        self._arm()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _rank_loaded(self, pair: LoRAPair, resized: bool) -> None:
        """The model loads a pair's weights; of another shape, they leave its state here void until ours is loaded."""
        if self._ranks is not None:
            self._ranks.forget_ranks()
        if not resized:
            return
        for p in (pair.A, pair.B):
            self.state.pop(p, None)
        drop_sketches(self.state, self.pairs)  # they begin anew, everywhere at once
        self._layers.restack()
        self._arm()

    def _forward_begins(self) -> None:
        """A forward that will be trained on: the model may have been moved, and gradients dropped."""
        self._layers.follow_devices(self.state)
        self._layers.forget_dropped(self.param_groups)

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; what the taps staged goes with the gradients (a GradScaler may have skipped ``step()``)."""
        super().zero_grad(set_to_none)
        self._layers.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; LoRA layers in the new group are found and hooked."""
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("peak_lr", 0.0)  # checkpoints that fill in a template want it there
        check_group(self.param_groups[-1])
        if self._attached:
            self._attach()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_settings": self._settings, "_scheduler": self._scheduler}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_settings" not in state:  # torch's load_state_dict passes here too: the layers are hooked already
            return
        self._model, self._ranks, self._attached = None, None, False
        self._attach()
