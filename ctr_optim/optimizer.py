"""CTROptimizer: parameter groups, ``step()`` and checkpoints. The packages of this directory contain the maths."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ctr_optim.checkpoint.validation import checked
from ctr_optim.curvature.blocks import drop_sketches
from ctr_optim.curvature.factors import STRUCTURES
from ctr_optim.curvature.kfac import KFAC
from ctr_optim.curvature.registry import CURVATURES
from ctr_optim.direction.average import Average, drop_averages
from ctr_optim.direction.fused import Fused
from ctr_optim.direction.gradients import all_finite
from ctr_optim.direction.layout import parameters_of
from ctr_optim.direction.stack import Stack, slope
from ctr_optim.direction.step import Step, directions
from ctr_optim.holdout import Holdout
from ctr_optim.metrics import describe, metrics_of
from ctr_optim.model import checks
from ctr_optim.model.coordinates import VECTORS
from ctr_optim.ranked import Ranked
from ctr_optim.ranks.controller import RankController, RankState
from ctr_optim.ranks.scheduler import RankScheduler
from ctr_optim.retention import Retention, boundary
from ctr_optim.retention.source import Retained
from ctr_optim.runtime import distributed
from ctr_optim.runtime.counters import Counters
from ctr_optim.runtime.devices import exact, together
from ctr_optim.runtime.messages import warn_failed
from ctr_optim.runtime.options import check_group_keys, given_parameters, suggests_options
from ctr_optim.settings import LEARNING_RATE, Settings, check_group, chosen, due
from ctr_optim.trust_region.bound import BOUNDS


class CTROptimizer(Ranked):
    r"""Adam in the K-FAC eigenbasis of LoRA layers, inside a trust region in nats per token.

    The method is reconstructed from the abstract of CTR-LoRA (arXiv 2510.15962). For layers :math:`y = W_0 x + s B A x`
    with :math:`h = A x` and per-token gradients g at B's output, hooks estimate :math:`H = E[h h^T]`,
    :math:`D = E[(B^T g)(B^T g)^T]` and the diagonals of :math:`C = E[x x^T]` and :math:`S = E[g g^T]`. A step is

    .. math::
        \Delta_A = -lr\, Q_D\, Adam(Q_D^T g_A), \quad \Delta_B = -lr\, Adam(g_B Q_H)\, Q_H^T, \quad
        \Delta \leftarrow \Delta \min(c, \sqrt{max\_kl / (\kappa q / 2)})

    where q is the step's quadratic form, weight decay included, in :math:`C \otimes D, H \otimes S` and their cross
    term. The coupling :math:`\kappa` is measured on the model. Parameters without these factors add
    :math:`\sum \max(\hat v, g^2) \Delta^2`, with Adam's second moments :math:`\hat v` and this step's gradient g.
    With ``kl_schedule="auto"``, c is 0.08 / peak lr, else 1.

    Args:
        params: parameters or parameter groups, as in torch. The optimizer finds the LoRA layers that own them.
        lr: leave it out, and use any schedule. With a bounded KL, only the schedule's shape matters. The default is
            8e-2, or AdamW's usual 2e-4 where the KL cannot be bounded.
        betas, eps, weight_decay: as in :class:`torch.optim.AdamW`, with a smaller ``betas[0]``.
        max_kl: bound on the predicted KL divergence of one step, in nats per token; None for no trust region.
        kl_schedule: ``"auto"``: the bound follows ``(lr / peak lr)^2`` (peak: the largest ``lr`` or ``initial_lr`` so
            far). It falls as ``1 / (1 + t / 25)`` over t steps at one lr, in proportion to the loss tokens of a step
            below 256, and with repeated rows. ``"lr"``: ``(lr / peak lr)^2`` only. ``"constant"``: ``max_kl``.
            ``"adaptive"``: the bound follows actual and predicted reductions of the loss; ``step(closure)`` calls the
            closure twice. Except with ``"auto"``, lr also limits the step.
        calibration_interval: largest number of steps between measurements of kappa. Each of the first 24 steps is
            measured, then steps 25, 36, 49, ..., and steps after unexpected values. None: kappa is 1, and the bound is
            not in nats.
        trust_penalty: lambda, in nats per nat. Training minimizes the loss plus ``lambda KL(base || model)`` per token;
            the factors and the measured coupling of the whole adapter predict this KL.
        curvature: ``"kfac"``; ``"gradient"``: the metric ``sum max(v^, g^2) delta^2`` for all parameters;
            ``"hutchinson"``: the Hessian's diagonal, for models that return their loss; ``"none"``: no trust region.
        factor_structure: structure of C and S: ``"diagonal"``, ``"lowrank"`` or ``"dense"``.
        factor_decay, factor_interval, basis_interval: decay of the factors' average; steps between updates of factors
            and of eigenbases.
        damping: damping of the whitening, relative to the mean eigenvalue.
        max_tokens: number of evenly spaced tokens that a layer samples in one forward pass; None for all.
        rank_scheduler: a :class:`RankScheduler` or a dict of its arguments, for ranks that change; None: fixed ranks.
        model: the model, if the optimizer must not search for it.
        resize: how ranks change: ``"physical"``: weights of new shapes; ``"masked"``: weights keep their shapes, and
            unused directions are zero; ``"auto"``: masked in several processes and in compiled models, else physical.
        loss_reduction: the loss's own reduction over tokens, ``"mean"`` or ``"sum"``.
        maximize: as in torch.
        retain: text on which the predictions must stay: batches (dicts for ``model(**batch)``, or tensors of token
            ids), a :class:`~ctr_optim.retention.Retention`, ``"self"`` (the model's samples), ``"random"`` or None.
        kl_budget: bound on the total KL divergence from the base model, in nats per token, measured on the retained
            text, or on the batch if there is none; None for no bound.
        holdout: a few batches that training never uses, or a :class:`~ctr_optim.holdout.Holdout`. If the loss on them
            rises, the bound shrinks, and the best weights are restored.
        average: True: keep a running average of the weights, for training without a schedule. Evaluate and save inside
            ``with opt.averaged():``, and call ``opt.use_average()`` at the end.
        foreach: None: the fastest available (Triton kernels on a GPU); True: torch operations on stacked layers;
            False: layer by layer.

    Raises:
        ValueError, TypeError: if an argument is invalid; names it, the given and the expected value.
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
        holdout: Iterable[Any] | Holdout | None = None,
        average: bool = False,
    ) -> None:
        self._settings = Settings(
            max_kl, kl_schedule, calibration_interval, trust_penalty, curvature, factor_structure, factor_decay,
            factor_interval, basis_interval, damping, max_tokens, resize, loss_reduction,
        )  # fmt: skip
        chosen("curvature", curvature, CURVATURES)
        chosen("factor_structure", factor_structure, STRUCTURES)  # An unknown name must fail before hooks are set.
        self._model = None if model is None else weakref.ref(model)
        self._attached = False
        self._retained, self._kl_budget, self._holdout = Retained(retain), kl_budget, Holdout.of(holdout)
        self._counters, self._rank_state = Counters(), RankState()
        self._bound = chosen("kl_schedule", kl_schedule, BOUNDS)(self._settings.max_kl)
        self._average = Average.of(average)
        self._bound.averaged = average
        self._ranks: RankController | None = None
        rate = LEARNING_RATE if lr is None else lr
        defaults = dict(lr=rate, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, foreach=foreach)
        super().__init__(given_parameters(params), defaults)
        self._scheduler = None if rank_scheduler is None else RankScheduler.of(rank_scheduler)
        if lr is None and not self._bounded:
            self._fall_back("max_kl=None" if max_kl is None else f"curvature={curvature!r}")
        self._attach()
        self._mirror()
        if self._trained.fsdp:
            self._retain()

    # -- the step -------------------------------------------------------------------------------------------------

    @_disable_dynamo  # torch's optimizers do the same: a compiled function that calls step() breaks its graph here.
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step, and return the closure's loss. If a gradient is not finite, only count a skipped step.

        Args:
            closure: re-evaluates the model and returns the loss.
        """
        checks.check_outside_backward()
        loss = None if closure is None else torch.enable_grad()(closure)()
        if closure is None and self._bound.needs_closure:
            self._once.warn(checks.NO_CLOSURE)
        if all(p.grad is None for p in parameters_of(self.param_groups)):
            self._watch.no_gradient(self.steps)
            return loss
        self._check_training_weights("step")
        self._retain()
        stacks = self._stack()
        self._judged(first=True)
        finite = self._look()
        with exact(stack.device for stack in stacks):
            self._learn(finite)
            step = self._within_budget(self._direction(stacks, finite), finite)
        given = {} if self._judge is None else {"holdout": self._judge.state.holdout_factor}
        scale = self._trust.constrain(step, self._curvature, self.param_groups, given) if step.bounded else None
        self._take(step, scale)
        if closure is not None and self._bound.needs_closure and step.bounded:
            self._trust.judge(closure, loss, stacks[0].group["maximize"], step.q)
        self._counters.steps += 1
        if scale is not None and not self._bound.sets_length:
            self._watch.stepped(self.steps, self.param_groups, self._trust.predicted, scale, self._trust.limit)
        if self._average is not None:
            self._average.add(self._held, self.state)
        try:
            self._judged()
            self._reallocate()
        finally:
            self._arm()
        if self._ranks is not None:
            self._ranks.notify()  # Listeners come last, so that one that raises leaves a valid optimizer.
        return loss

    def _within_budget(self, step: Step, finite: Tensor) -> Step:
        """Remove the part of a step that would exceed ``kl_budget``."""
        if self._budget is None or not step.bounded:
            return step
        length = self._length()
        scale = self._trust.expected(step, length**2, self.param_groups)
        deltas = self._budget.along(step.deltas, scale, length, finite, self.state)
        if deltas is None:
            return step
        q = together(self._curvature.quadratic(deltas, ())).sum()
        return replace(step, deltas=deltas, q=q, slope=slope(deltas, finite))

    def _take(self, step: Step, scale: Tensor | None) -> None:
        """Apply the step; shorten it first if ``kl_budget`` requires that."""
        budget = self._budget
        if budget is None:
            step.take_(scale)
            return
        budget.begin()
        length = self._length()
        factor = budget.factor(length)
        scale = factor * (torch.ones_like(step.q) if scale is None else scale)
        step.take_(scale)
        budget.moved(length, factor, scale, self._budget_due, self.state)

    def _look(self) -> Tensor:
        """Return ``()`` whether all gradients are finite; count a skipped step if not."""
        found = self._fused.look()
        self._fuses = found is not None
        finite = all_finite(self.param_groups, self._fused.params if self._fuses else (), found)
        skip = (~finite).long()
        self._skipped = skip if self._skipped is None else self._skipped + skip.to(self._skipped.device)
        return finite

    def _learn(self, finite: Tensor) -> None:
        """Update the curvature and the eigenbases that are due."""
        self._curvature.follow_devices(self.state)
        self._follow_devices()
        sketched = self._curvature.due(self._counters.steps)
        scale = self._trust.observe(self._held[0].dtype, finite.device)
        self._curvature.update(finite, (self._settings, self._scheduler), scale)
        if sketched and self._ranks is not None:
            self._ranks.count_sketched(finite)
        if sketched and not self._fused.stacks:
            self._fused, self._fuses = Fused(self._fusible()), False  # The kernels start at the next step.
        if due(self._counters.steps, self._settings.basis_interval) and (failed := self._curvature.refresh()):
            self._counters.failed += failed
            warn_failed("an eigenbasis", "the layers keep their current eigenbases")

    def _direction(self, stacks: Sequence[Stack], finite: Tensor) -> Step:
        """Return the unscaled step of all stacks, with its quadratic form and the loss's slope."""
        fused = self._fused if self._fuses else Fused(())
        kfac = self._curvature if isinstance(self._curvature, KFAC) else None
        penalties = kfac.penalties(self._trust.coupling.of_adapter) if kfac is not None else {}
        deltas, known = directions(stacks, fused, finite, penalties)
        if not deltas:
            raise RuntimeError(checks.REPLACED)
        done = fused if known else Fused(())
        rest = {stack: delta for stack, delta in deltas.items() if stack not in done.stacks}
        forms = [*self._curvature.quadratic(deltas, done.blocks), *known[:1]]
        zero = torch.zeros((), device=next(iter(deltas.values())).device)
        if not forms:
            return Step(deltas, fused, zero, zero, False)
        slopes = ([slope(rest, finite)] if rest else []) + known[1:]
        return Step(deltas, fused, together(forms).sum(), together(slopes).sum(), True, self._curvature.tokens())

    # -- properties, metrics and checkpoints --------------------------------------------------------------------

    def __repr__(self) -> str:
        ranks = {p.name: p.rank for p in self.pairs} if self._ranks is None else self._ranks.known
        return describe(self.param_groups, self.pairs, ranks, self._settings, self._scheduler, self.steps)

    @torch.no_grad()
    def metrics(self) -> dict[str, Any]:
        """Return plain numbers about the last step; waits for the device.

        Keys: ``trust/predicted_kl`` and ``trust/max_kl`` (nats per token), ``trust/scale`` (the step's factor, relative
        to the largest possible one), ``trust/factor/...`` (factors of ``max_kl``), ``trust/coupling``,
        ``trust/source``, ``trust/unbounded`` (parameters without a bound in nats), ``kl_from_base`` (estimate in nats
        per token; docs/limits.md) and ``kl_from_base/layer``, ``ranks``, ``utility`` (nats per token, at the last rank
        event), ``skipped_steps``, ``failed_decompositions``; with ``holdout``, ``holdout/...``; with ``kl_budget``,
        ``budget/...``, and ``retain/kl`` if it is measured on retained text.
        """
        self._count_skipped()
        utility = self._ranks.utility if self._ranks is not None else {}
        bounded = self._bounded and self._trust.coupling.known
        trained = sum(p.numel() for p in self._held if p.requires_grad)
        metrics = metrics_of(self.blocks, self._trust, self._counters, self.ranks, utility)
        metrics |= {"trust/unbounded": 0 if bounded else trained}
        metrics |= {} if self._judge is None else self._judge.metrics()
        return metrics if self._budget is None else metrics | self._budget.metrics()

    def close(self) -> None:
        """Remove every hook from the model. Later steps use the current factors and ranks."""
        self._finalizer()
        self._curvature.close()
        self._trust.coupling.prober = None
        drop_sketches(self.state, self.pairs)
        self._restack()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as in torch. ``torch.load(..., weights_only=True)`` accepts it."""
        self._count_skipped()
        self._follow()
        self._mirror()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint exactly: unlike torch, do not cast tensors to the parameters' dtype.

        Raises:
            ValueError: if it belongs to other parameters or is damaged; the optimizer stays unchanged.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._follow()
        distributed.reshard(self._trained.fsdp)  # The layers then refer to the parameters in our groups again.
        state, groups, numbers = checked(
            state_dict, self.param_groups, self.pairs, self._settings, self._curvature, self._numbers()
        )
        carried = any(VECTORS in entry for entry in state.values())
        if self._retained.pending and state and not carried:
            raise ValueError("checkpoint: it was written without retain; build the optimizer without retain to load it")
        if carried:
            self._retained.settle()
        if self._average is None:
            drop_averages(state, numbers)
        if self._budget is None:
            boundary.forget(state)
        self.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        self._go_on(numbers)
        self._mirror()
        self._restack()
        self._arm()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients as in torch, and drop their statistics: a GradScaler may have skipped ``step()``."""
        super().zero_grad(set_to_none)
        self._curvature.forget()
        self._trust.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch, and hook its LoRA layers."""
        check_group_keys(param_group, self.defaults, Settings.__dataclass_fields__)
        self._check_training_weights("add_param_group")
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("peak_lr", 0.0)  # Checkpoint loaders that fill a template need the key.
        check_group(self.param_groups[-1])
        if self._attached:
            self._attach()
            if self._average is not None:  # A new parameter has no weights of earlier steps.
                self._average.state.averaged_steps = 0
