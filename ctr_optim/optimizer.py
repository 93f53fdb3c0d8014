"""CTROptimizer: parameter groups, ``step()`` and checkpoints. The packages beside this file hold the maths."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ctr_optim.checkpoint.matching import resize_on_load
from ctr_optim.checkpoint.numbers import Counters, pack, unpack
from ctr_optim.checkpoint.validation import checked
from ctr_optim.curvature.base import Curvature
from ctr_optim.curvature.blocks import Block, drop_sketches
from ctr_optim.curvature.gradient import Gradient
from ctr_optim.curvature.hutchinson import Hutchinson
from ctr_optim.curvature.kfac import KFAC
from ctr_optim.curvature.none import NoCurvature
from ctr_optim.direction.coordinates import VECTORS
from ctr_optim.direction.fused import Fused
from ctr_optim.direction.gradients import all_finite
from ctr_optim.direction.layout import Layout, lay_out, parameters_of, same_parameters
from ctr_optim.direction.stack import Stack, slope
from ctr_optim.direction.step import Step, directions
from ctr_optim.metrics import describe, metrics_of
from ctr_optim.model import checks
from ctr_optim.model.pair import LoRAPair
from ctr_optim.model.trained import Trained
from ctr_optim.ranks.controller import RankController, RankState
from ctr_optim.ranks.events import RankEvent
from ctr_optim.ranks.scheduler import RankScheduler
from ctr_optim.retention import Retention
from ctr_optim.retention.budget import Budget, check_budget
from ctr_optim.retention.meter import meter_of
from ctr_optim.retention.source import Retained
from ctr_optim.runtime import distributed
from ctr_optim.runtime.devices import exact, together
from ctr_optim.runtime.hooks import Hook, weakly
from ctr_optim.runtime.messages import Once, warn_failed, warn_skipped, warn_unbounded
from ctr_optim.runtime.options import check_group_keys, given_parameters, suggests_options
from ctr_optim.runtime.watch import Watch
from ctr_optim.settings import EVERYDAY_RATE, LEARNING_RATE, Settings, check_group, due
from ctr_optim.trust_region.bound import bound_named
from ctr_optim.trust_region.coupling import Coupling
from ctr_optim.trust_region.probe import Probe
from ctr_optim.trust_region.region import TrustRegion


class CTROptimizer(Optimizer):
    r"""Adam in the K-FAC eigenbasis of LoRA layers, inside a trust region in nats per token.

    Reconstructed from the abstract of CTR-LoRA (arXiv 2510.15962). For each layer :math:`y = W_0 x + s B A x`, hooks
    keep :math:`H = E[h h^T]`, :math:`D = E[(B^T g)(B^T g)^T]` and the diagonals of :math:`C = E[x x^T]` and
    :math:`S = E[g g^T]` (:math:`h = A x`, g the per-token gradient at B's output). A step is

    .. math::
        \Delta_A = -lr\, Q_D\, Adam(Q_D^T g_A), \quad \Delta_B = -lr\, Adam(g_B Q_H)\, Q_H^T, \quad
        \Delta \leftarrow \Delta \min(1, \sqrt{max\_kl / (\kappa q / 2)})

    with q the step's quadratic form in :math:`C \otimes D, H \otimes S` and their cross term, weight decay included,
    and :math:`\kappa` measured on the model. Parameters without such factors count by Adam's second moments,
    :math:`\sum \hat v \Delta^2`.

    Args:
        params: parameters or groups, as in torch; the LoRA layers that own them are found by themselves.
        lr: leave it out, and schedule it as ever. Above about 0.01 the KL bound, not lr, sets the step length. The
            default is 8e-2, or AdamW's everyday 2e-4 where no trust region can hold.
        betas, eps, weight_decay: as in :class:`torch.optim.AdamW`, but for a shorter memory of gradients: the bound
            sets how long a step is, and old gradients only turn it.
        max_kl: bound on the predicted KL divergence per token of one step, in nats; None for no trust region.
        kl_schedule: ``"auto"``: the bound follows ``(lr / peak lr)^2``, the peak being the largest lr seen or left by a
            scheduler as ``initial_lr``; it falls as ``1 / (1 + t / 25)`` over t steps at one lr, and in proportion to a
            batch's loss tokens below 256. ``"lr"``: the first of these alone. ``"constant"``: none of them.
            ``"adaptive"``: from predicted and actual reduction of the loss, needs ``step(closure)``, which is called
            twice.
        calibration_interval: most steps between measurements of kappa, which come at steps 0, 1, 4, 9, 16, ... before;
            None: kappa is 1, the plain metric.
        trust_penalty: lambda, nats per nat: what is minimized is the loss plus ``lambda KL(base || model)`` per token,
            the KL by the factors and the measured coupling of the whole adapter.
        curvature: ``"kfac"``; ``"gradient"``: the metric ``sum v^ delta^2`` from Adam's second moments, which also
            serves for parameters of no LoRA layer; ``"hutchinson"``: the Hessian's diagonal, for models that return
            their loss; ``"none"``.
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
        retain: text whose predictions should stay: an iterable of batches (dicts for ``model(**batch)``, or tensors of
            token ids), a :class:`~ctr_optim.retention.Retention`, ``"self"`` (the model's own samples) or None.
        kl_budget: bound on the KL divergence from the base model in all, nats per token, measured on retained text or
            else on the batch; None for no bound.
        foreach: None: the fastest that applies (Triton kernels on a GPU); True: torch operations on stacked layers;
            False: layer by layer.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what was expected.
    """

    _finalizer: weakref.finalize

    @suggests_options
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.8, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_kl: float | None = 0.1,
        kl_schedule: str = "auto",
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
        retain: Iterable[Any] | Retention | str | None = None,
        kl_budget: float | None = None,
    ) -> None:
        self._settings = Settings(
            max_kl, kl_schedule, calibration_interval, trust_penalty, curvature, factor_structure, factor_decay,
            factor_interval, basis_interval, damping, max_tokens, resize, loss_reduction,
        )  # fmt: skip
        self._model = None if model is None else weakref.ref(model)
        self._attached = False
        self._retained, self._kl_budget = Retained(retain), kl_budget
        self._counters, self._rank_state = Counters(), RankState()
        self._bound = bound_named(kl_schedule)(self._settings.max_kl)
        self._ranks: RankController | None = None
        rate = LEARNING_RATE if lr is None else lr
        defaults = dict(lr=rate, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, foreach=foreach)
        super().__init__(given_parameters(params), defaults)
        self._scheduler = None if rank_scheduler is None else RankScheduler.of(rank_scheduler)
        if lr is None and (max_kl is None or curvature == "none"):
            self._fall_back("max_kl=None" if max_kl is None else "curvature='none'")
        self._attach()
        self._mirror()
        if self._trained.fsdp:
            self._retain()

    def _fall_back(self, reason: str) -> None:
        """Take AdamW's everyday learning rate where none was given and no trust region holds."""
        self.defaults["lr"] = EVERYDAY_RATE
        for group in self.param_groups:
            group["lr"] = EVERYDAY_RATE if group["lr"] == LEARNING_RATE else group["lr"]
        warn_unbounded(reason, EVERYDAY_RATE)

    # -- the model ------------------------------------------------------------------------------------------------

    def _attach(self, numbers: Mapping[str, Any] | None = None) -> None:
        """Find the LoRA layers that own our parameters, and hook them; ``numbers``: what they knew before."""
        if self._attached:
            numbers = self._numbers()
            self._finalizer()
        self._attached = True
        self._once = getattr(self, "_once", Once())
        model = self._model() if self._model is not None else None
        self._held = parameters_of(self.param_groups)
        self._trained = Trained(self._held, model, self._settings.curvature)
        self.pairs = self._trained.pairs
        self._ranks = self._rank_controller()
        home = self._trained.home()
        measured = self._settings.calibration_interval is not None and self._settings.curvature != "none"
        wanted = home is not None and (measured or self._settings.curvature == "hutchinson")
        probe = Probe(home, self._trained.owners()) if home is not None and wanted else None
        self._curvature = self._curvature_of(probe)
        coupling = Coupling(probe if measured else None, self._curvature.quiet, self._settings.calibration_interval)
        before: TrustRegion | None = getattr(self, "_trust", None)
        self._trust = TrustRegion(self._bound, coupling)
        if before is not None:  # a new group: metrics() still describes the last step
            self._trust.predicted, self._trust.scale, self._trust.limit = before.predicted, before.scale, before.limit
        self._budget = self._budget_of(home, coupling)
        unpack(numbers or {}, self._owners())
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
        """The bound on the distance from the base model; measured from the first step on."""
        if self._kl_budget is None:
            return None
        check_budget(self._kl_budget, self.pairs, self._held, self._settings.curvature)
        text = self._retained.text if self._retained.has_text else None
        meter = meter_of(home, self.pairs, text, coupling.prober, coupling.quiet)
        return Budget(float(self._kl_budget), meter, self.pairs)

    def _curvature_of(self, probe: Probe | None) -> Curvature:
        """The curvature that the options name."""
        if self._settings.curvature == "kfac" and self.pairs:
            return KFAC(self.pairs, self._settings)
        if self._settings.curvature == "hutchinson":
            return Hutchinson(probe, self._settings.factor_decay, self._settings.calibration_interval)
        return NoCurvature() if self._settings.curvature == "none" else Gradient()

    def _hook_forwards(self) -> list[Any]:
        """Hooks that call :meth:`_forward_begins` where statistics are taken, or retained text is to be measured."""
        if not isinstance(self._curvature, KFAC) and not self._retained.pending:
            return []
        begins = partial(_forward_begins, weakly(self._forward_begins))
        return [root.register_forward_pre_hook(Hook(begins, id(root))) for root in self._trained.roots]

    def _rank_controller(self) -> RankController | None:
        if self._scheduler is None:
            return None
        checks.check_ranks_can_move(self.pairs, self._trained.roots, self._settings)
        listeners = self._ranks.listeners if self._ranks is not None else []
        return RankController(
            self._scheduler, self._settings.damping, self.pairs, listeners, self._rank_state, self._counters
        )

    # -- stacks ---------------------------------------------------------------------------------------------------

    def _stack(self) -> list[Stack]:
        """Everything that trains, by shape; laid out anew after anything replaced the state that the stacks share."""
        self._follow()
        if self._layout is None:
            distributed.reshard(self._trained.fsdp)  # a forward may have left gathered copies in the parameters' places
            kfac = isinstance(self._curvature, KFAC)
            pairs = self.pairs if kfac else []
            self._layout = lay_out(pairs, self.param_groups, self.state, self._prepare)
            self._curvature.bind(self._layout.pairs, self._layout.others)
            self._fused = Fused(self._fusible())
        return self._layout.stacks

    def _prepare(self, state: Any, kept: list[nn.Parameter]) -> None:
        """Add to the state of parameters what curvature and retention keep there."""
        self._curvature.prepare(state, kept)
        self._retained.prepare(state, self.pairs)

    def _retain(self) -> None:
        """Measure the retained text, once, and move to its coordinates.

        Before the first training forward, when the model is where it will be trained; a sharded model's outermost
        forward is not to be entered twice, so that it is measured at construction, or at the first step.
        """
        if not self._retained.pending:
            return
        self._follow()
        with torch.no_grad():
            self._retained.measure(self._trained.home() or self._trained.roots[0])
            distributed.reshard(self._trained.fsdp)
            self._retained.start_([pair for pair in self.pairs if id(pair.A) in map(id, self._held)], self.state)
        self._restack()
        self._arm()

    def _restack(self) -> None:
        """Drop the stacks: something replaced the state that they share."""
        self._layout, self._fused = None, Fused(())
        if isinstance(self._curvature, KFAC):
            self._curvature.unbind()

    def _fusible(self) -> list[Block]:
        """Blocks whose quadratic form the kernels know: all layers have factors, and nothing is added to the step."""
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
        """Take the parameters that Accelerate puts into our groups when it shards the model that we were built with.

        Modules, and with them hooks and layers, stay; so do their statistics. In other cases ``step()`` refuses.
        """
        parameters = parameters_of(self.param_groups)
        if same_parameters(parameters, self._held):
            return
        fsdp = distributed.fsdp_modules(self._trained.roots)
        distributed.reshard(fsdp)
        ours = {id(p) for p in parameters}
        if self._counters.steps or not all(id(pair.B) in ours for pair in self.pairs):
            return
        checks.check_sharding(parameters, self._settings.curvature)
        for p in self._held:
            self.state.pop(p, None)
        self._held, self._trained.fsdp, self._layout = parameters, fsdp, None
        self._stack()

    def _arm(self) -> None:
        """Decide what the coming forward and backward passes record."""
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
        """Begin to sketch the whitened gradient for ``rank`` candidate directions a layer, unless begun already."""
        if self._open_sketch(rank):
            self._arm()

    def _open_sketch(self, rank: int) -> bool:
        assert isinstance(self._curvature, KFAC)
        self._stack()
        opened = self._curvature.open_sketch(rank, self.state)
        if opened and self._ranks is not None:
            self._ranks.begin_sketch()
        return opened

    # -- the step -------------------------------------------------------------------------------------------------

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
        loss = _evaluated(closure)
        if closure is None and self._bound.needs_closure:
            self._once.warn(checks.NO_CLOSURE)
        if all(p.grad is None for p in parameters_of(self.param_groups)):
            self._watch.no_gradient(self.steps)
            return loss
        self._retain()
        stacks = self._stack()
        finite = self._look()
        with exact(stack.device for stack in stacks):
            self._learn(finite)
            step = self._direction(stacks, finite)
        scale = self._trust.constrain(step, self._curvature, self.param_groups) if step.bounded else None
        self._take(step, scale)
        if closure is not None and self._bound.needs_closure and step.bounded:
            self._trust.judge(closure, loss, stacks[0].group["maximize"], step.q)
        self._counters.steps += 1
        if scale is not None:
            self._watch.stepped(self.steps, self.param_groups, self._trust.predicted, scale, self._trust.limit)
        try:
            self._reallocate()
        finally:
            self._arm()
        if self._ranks is not None:
            self._ranks.notify()  # last: a listener that raises must leave an optimizer that works
        return loss

    def _take(self, step: Step, scale: Tensor | None) -> None:
        """Take the step, within the budget from the base model where there is one."""
        budget = self._budget
        if budget is None:
            step.take_(scale)
            return
        budget.begin()
        length = self._length()
        factor = budget.factor(length)
        step.take_(factor * (torch.ones_like(step.q) if scale is None else scale))
        budget.moved(factor * length, self._budget_due)

    def _length(self) -> float:
        """Length of a step, the root of its KL in nats: of the bound, or of the last step where there is none."""
        limit = self._bound.state.max_kl if self._trust.limit is None else self._trust.limit
        return math.sqrt(float(self._trust.predicted if limit is None else limit))

    def _look(self) -> Tensor:
        """``()`` whether all gradients are finite."""
        found = self._fused.look()
        self._fuses = found is not None
        finite = all_finite(self.param_groups, self._fused.params if self._fuses else (), found)
        skip = (~finite).long()
        self._skipped = skip if self._skipped is None else self._skipped + skip.to(self._skipped.device)
        return finite

    def _learn(self, finite: Tensor) -> None:
        """Bring the curvature up to date, and the bases in which directions are found."""
        self._curvature.follow_devices(self.state)
        self._follow_devices()
        sketched = self._curvature.due(self._counters.steps)
        self._curvature.update(finite, (self._settings, self._scheduler))
        if sketched and self._ranks is not None:
            self._ranks.count_sketched(finite)
        if sketched and not self._fused.stacks:
            self._fused, self._fuses = Fused(self._fusible()), False  # from the next step on
        if due(self._counters.steps, self._settings.basis_interval) and (failed := self._curvature.refresh()):
            self._counters.failed += failed
            warn_failed("an eigenbasis", "the layers keep the one that they have")

    def _direction(self, stacks: Sequence[Stack], finite: Tensor) -> Step:
        """Every stack's step before the trust region, with its length and slope in the chosen curvature."""
        fused = self._fused if self._fuses else Fused(())
        kfac = self._curvature if isinstance(self._curvature, KFAC) else None
        penalties = kfac.penalties(self._trust.coupling.of_adapter) if kfac is not None else {}
        deltas, known = directions(stacks, fused, finite, penalties)
        if not deltas:
            raise RuntimeError(checks.REPLACED)
        done = fused if known else Fused(())
        rest = {stack: delta for stack, delta in deltas.items() if stack not in done.stacks}
        forms = [*self._curvature.quadratic(rest if not done.blocks else deltas, done.blocks), *known[:1]]
        zero = torch.zeros((), device=next(iter(deltas.values())).device)
        if not forms:
            return Step(deltas, fused, zero, zero, False)
        slopes = ([slope(rest, finite)] if rest else []) + known[1:]
        return Step(deltas, fused, together(forms).sum(), together(slopes).sum(), True, self._curvature.tokens())

    def _reallocate(self) -> None:
        """Hold a rank event where one is due."""
        if self._ranks is None:
            return
        checks.check_ranks_belong_to_us(self.param_groups)
        step, curvature = self._counters.steps, self._curvature
        if step != self._ranks.scheduler.next_event(step):
            return
        if not (isinstance(curvature, KFAC) and curvature.able):  # closed: nothing new is known of the layers
            return
        masked = self._masked()
        if not masked:
            checks.check_single_process()
        blocks = self.blocks
        distributed.reshard(self._trained.fsdp)
        try:
            with exact(block.H.device for block in blocks):
                coupling = self._trust.coupling.of_adapter if self._trust.coupling.known else None
                self._ranks.event(blocks, self.state, step, masked, coupling)
        finally:
            self._restack()

    def _masked(self) -> bool:
        """Whether layers keep their shapes when ranks move."""
        if self._settings.resize != "auto":
            return self._settings.resize == "masked"
        return checks.shapes_must_stay(self._trained.roots)

    # -- what users read and save -------------------------------------------------------------------------------

    def __repr__(self) -> str:
        ranks = {p.name: p.rank for p in self.pairs} if self._ranks is None else self._ranks.known
        return describe(self.param_groups, self.pairs, ranks, self._settings, self._scheduler, self.steps)

    def _owners(self) -> list[Any]:
        """Objects that own numbers of a checkpoint."""
        owners = [self._counters, self._rank_state, self._bound.state, self._trust.coupling.state]
        owners += [] if self._budget is None else [self._budget.state]
        return [*owners, self._curvature.state] if isinstance(self._curvature, Hutchinson) else owners

    def _numbers(self) -> dict[str, Any]:
        """Numbers of the optimizer as a whole; checkpoints keep them in the first group under ``"ctr"``."""
        if self._ranks is not None:
            self._ranks.settle()
        return pack(self._owners())

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self._counters.steps

    @property
    def ranks(self) -> dict[str, int]:
        """Directions in use, by layer; may wait for the device (and processes) after a checkpoint was loaded."""
        if self._ranks is not None:
            distributed.reshard(self._trained.fsdp)
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
        self._scheduler = scheduler
        self._ranks.use(scheduler)
        if not scheduler.sketches(self.steps):
            drop_sketches(self.state, self.pairs)
            self._restack()
        self._arm()

    @torch.no_grad()
    def metrics(self) -> dict[str, Any]:
        """What the last step did, as plain floats; waits for the device.

        Keys: ``trust/predicted_kl`` and ``trust/max_kl`` (nats per token), ``trust/scale`` (factor applied to the
        step), ``trust/coupling`` and ``trust/source``, ``trust/unbounded`` (parameters that no measured
        metric bounds), ``kl_from_base`` (nats per token; an estimate, right in
        proportion between layers) and ``kl_from_base/layer``, ``ranks``, ``utility`` (nats per token, at the last rank
        event), ``skipped_steps``, ``failed_decompositions`` (where one failed, layers kept their bases, or ranks).
        """
        self._count_skipped()
        utility = self._ranks.utility if self._ranks is not None else {}
        measures = self._settings.curvature != "none" and self._bound.state.max_kl is not None
        bounded = measures and self._trust.coupling.known
        trained = sum(p.numel() for p in self._held if p.requires_grad)
        metrics = metrics_of(self.blocks, self._trust, self._counters, self.ranks, utility)
        metrics |= {"trust/unbounded": 0 if bounded else trained}
        return metrics if self._budget is None else metrics | self._budget.metrics()

    def on_rank_event(self, listener: Callable[[RankEvent], None]) -> None:
        """Call ``listener`` with every :class:`RankEvent`, in the order of the layers' names."""
        if self._ranks is None:
            raise ValueError("on_rank_event: this optimizer has no rank_scheduler, and will emit no events")
        self._ranks.listeners.append(listener)

    def close(self) -> None:
        """Remove every hook from the model; the optimizer then takes steps with the factors and ranks that it has."""
        self._finalizer()
        self._curvature.close()
        self._trust.coupling.prober = None
        drop_sketches(self.state, self.pairs)
        self._restack()

    def _count_skipped(self) -> None:
        """Move the count of skipped steps from the device to the state; waits for the device."""
        skipped, self._skipped = int(self._skipped or 0), None
        if skipped:
            self._counters.skipped += skipped
            warn_skipped()

    def state_dict(self) -> dict[str, Any]:
        """As in torch: tensors, numbers and lists only, fit for ``torch.load(..., weights_only=True)``."""
        self._count_skipped()
        self._follow()
        self._mirror()
        return super().state_dict()

    def _mirror(self) -> None:
        """Copy the numbers to the first group: torch.distributed.checkpoint saves what live groups hold."""
        self.param_groups[0]["ctr"] = self._numbers()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, exactly: unlike torch's, nothing is cast to the parameters' dtype.

        Raises:
            ValueError: if it belongs to other parameters, or is damaged; nothing is loaded then.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._follow()
        distributed.reshard(self._trained.fsdp)  # the layers hold the parameters of our groups again
        state, groups, numbers = checked(state_dict, self.param_groups, self.pairs, self._settings, self._numbers())
        carried = any(VECTORS in entry for entry in state.values())
        if self._retained.pending and state and not carried:
            raise ValueError(
                "checkpoint: it was written without retain; build the optimizer without retain to go on with it"
            )
        if carried:
            self._retained.settle()
        self.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        unpack(numbers, self._owners())
        self._mirror()
        self._restack()
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
        self._restack()
        self._arm()

    def _forward_begins(self) -> None:
        """A forward that will be trained on: the model may have been moved, and gradients dropped."""
        if not self._trained.fsdp:
            self._retain()
        self._curvature.follow_devices(self.state)
        self._follow_devices()
        self._forget_dropped()

    def _follow_devices(self) -> None:
        """Move the state of parameters of no LoRA layer to where the model has been moved."""
        for stack in self._layout.others if self._layout is not None else ():
            stack.to_(stack.params[0].device, self.state)

    def _forget_dropped(self) -> None:
        """Drop staged statistics where all gradients are None or zero: ``model.zero_grad()`` notifies no optimizer."""
        kfac = self._curvature
        if not isinstance(kfac, KFAC) or not kfac.taps.enabled or self._trained.fsdp:
            return  # FSDP2 keeps what it accumulates elsewhere
        if not same_parameters(parameters_of(self.param_groups), self._held):
            return
        grads = [p.grad for pair in self.pairs for p in (pair.A, pair.B) if p.grad is not None]
        kfac.forget(together([n != 0 for n in torch._foreach_norm(grads)]).any() if grads else None)

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; what the taps staged goes with the gradients (a GradScaler may have skipped ``step()``)."""
        super().zero_grad(set_to_none)
        self._curvature.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; LoRA layers in the new group are found and hooked."""
        check_group_keys(param_group, self.defaults, Settings.__dataclass_fields__)
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("peak_lr", 0.0)  # checkpoints that fill in a template want it there
        check_group(self.param_groups[-1])
        if self._attached:
            self._attach()

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            "_settings": self._settings,
            "_scheduler": self._scheduler,
            "_retained": self._retained,
            "_kl_budget": self._kl_budget,
            "_carried": self._numbers(),
        }
        return {**super().__getstate__(), **own}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_settings" not in state:  # torch's load_state_dict passes here too: the layers are hooked already
            return
        self._model, self._ranks, self._attached = None, None, False
        self._counters, self._rank_state = Counters(), RankState()
        self._bound = bound_named(self._settings.kl_schedule)(self._settings.max_kl)
        self._attach(self.__dict__.pop("_carried"))


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, with gradients; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _detach(close: Callable[[], None], probe: Probe | None, handles: Iterable[Any]) -> None:
    """Remove every hook from the model."""
    close()
    for handle in handles:
        handle.remove()
    if probe is not None:
        probe.close()


def _forward_begins(begins: Callable[[], Any], *_: Any) -> None:
    """Look at the gradients before a forward pass: a GradScaler skips ``step()`` on an overflow.

    The hook sits on the whole model: checkpointing runs parts of the model again during backward.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        begins()
