"""The LoRA layers of one optimizer: what it finds in the user's model, what it hangs on it, what it stacks of it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.curvature import hutchinson
from ctr_optim.curvature.capture import Taps
from ctr_optim.curvature.factors import STRUCTURES
from ctr_optim.curvature.kfac import Block, TokenScale, refresh_bases, stack_all
from ctr_optim.direction.fused import Fused
from ctr_optim.direction.stack import Stack, slope
from ctr_optim.model import checks
from ctr_optim.model.discovery import find_roots
from ctr_optim.model.pair import LoRAPair
from ctr_optim.model.registry import find_pairs
from ctr_optim.runtime import distributed
from ctr_optim.runtime.amp import grad_scale
from ctr_optim.runtime.devices import together
from ctr_optim.runtime.hooks import Hook
from ctr_optim.runtime.messages import users_line, warn_failed
from ctr_optim.settings import Settings
from ctr_optim.trust_region.probe import Probe

Groups = Sequence[dict[str, Any]]
State = MutableMapping[Any, dict[str, Tensor]]


class Attachment:
    """Taps on the layers, a probe on the model that owns them, and word of every forward that will be trained on.

    The model's hooks hold this object, and it holds nothing of the optimizer.
    """

    def __init__(
        self, roots: Sequence[nn.Module], pairs: Sequence[LoRAPair], settings: Settings, begins: Callable[[], Any]
    ) -> None:
        self.taps = Taps(pairs if settings.curvature == "kfac" else [], settings.max_tokens)
        self.probe: Probe | None = None
        if pairs and settings.curvature != "none" and settings.calibration_interval is not None:
            layers = [pair.layer for pair in pairs]
            home = next((root for root in roots if {id(m) for m in layers} <= {id(m) for m in root.modules()}), None)
            self.probe = None if home is None else Probe(home, layers)
        begin = partial(_forward_begins, begins)
        hooked = roots if self.taps.stages else []
        self.handles: list[Any] = [root.register_forward_pre_hook(Hook(begin, id(root))) for root in hooked]

    def close(self) -> None:
        """Remove every hook."""
        self.taps.close()
        for handle in self.handles:
            handle.remove()
        if self.probe is not None:
            self.probe.close()


class Layers:
    """LoRA layers with hooks and factors, and all else that trains, stacked by shape.

    ``optimizer.state`` stays the truth and may be replaced (by a checkpoint, say): it is passed in wherever it is read
    or written, and after such a change :meth:`restack` drops the stacks, whose tensors it shares.

    Attributes:
        pairs: layers of which the parameters include B.
        blocks: layers of one shape each, with factors; empty until :meth:`stack` was called.
        fused: the part of a step that kernels take.
        fsdp: modules that FSDP2 wraps.
        taps, probe: what :meth:`hook` hangs on the model.
    """

    def __init__(self, groups: Groups, model: nn.Module | None, settings: Settings) -> None:
        self.settings, self._held = settings, _parameters(groups)
        roots, self.pairs = _find(self._held, model, settings)
        self._roots = [weakref.ref(root) for root in roots]
        self.fsdp = distributed.fsdp_modules(roots)
        self._looked = False
        self._stacks: list[Stack] | None = None
        self.blocks: list[Block] = []
        self.fused = Fused(())

    @property
    def roots(self) -> list[nn.Module]:
        """The models that hold the parameters."""
        return [root for ref in self._roots if (root := ref()) is not None]

    def hook(self, begins: Callable[[], Any]) -> Attachment:
        """Hang taps and probe on the model; ``begins`` is called before every forward that will be trained on."""
        attachment = Attachment(self.roots, self.pairs, self.settings, begins)
        self.taps, self.probe = attachment.taps, attachment.probe
        return attachment

    # -- stacks -------------------------------------------------------------------------------------------------------

    def stack(self, groups: Groups, state: State) -> list[Stack]:
        """The stacks of all parameters that train; built anew after anything replaced their state."""
        self.follow(groups, state)
        if self._stacks is None:
            distributed.reshard(self.fsdp)  # a forward may have left its gathered copies in the parameters' places
            curvature = self.settings.curvature
            if curvature == "hutchinson":
                hutchinson.make_room(state, [p for p in _parameters(groups) if p.requires_grad])
            structure = STRUCTURES[self.settings.factor_structure]
            self._stacks, self.blocks = stack_all(self.pairs if curvature == "kfac" else [], groups, state, structure)
            self.fused = Fused(self.blocks if self.settings.trust_penalty == 0 else ())
        return self._stacks

    def restack(self) -> None:
        """Drop the stacks: something replaced the state that they share."""
        self._stacks, self.blocks, self.fused = None, [], Fused(())

    def follow(self, groups: Groups, state: State) -> None:
        """Take the parameters that Accelerate puts into our groups when it shards the model that we were built with.

        Modules, and with them hooks and layers, stay; so does what the layers saw until then. In other cases
        ``step()`` says what is wrong.
        """
        if not self._replaced(groups):
            return
        fsdp = distributed.fsdp_modules(self.roots)
        distributed.reshard(fsdp)
        parameters = _parameters(groups)
        ours = {id(p) for p in parameters}
        if groups[0]["ctr"]["steps"] or not all(id(pair.B) in ours for pair in self.pairs):
            return
        checks.check_sharding(parameters, self.settings.curvature)
        for p in self._held:
            state.pop(p, None)
        self._held, self.fsdp, before = parameters, fsdp, self.blocks
        self.restack()
        self.stack(groups, state)
        for block in self.blocks:
            block.adopt_sums(before)

    def _replaced(self, groups: Groups) -> bool:
        """Whether the groups hold other parameters than those that we know."""
        parameters = _parameters(groups)
        return len(parameters) != len(self._held) or any(
            a is not b for a, b in zip(parameters, self._held, strict=True)
        )

    def follow_devices(self, state: State) -> None:
        """Move the state to where the model has been moved since."""
        if any([block.follow_(state) for block in self.blocks]):
            self.stage()
        for stack in self._stacks or ():
            if stack.rank_dim is None:
                stack.to_(stack.params[0].device, state)

    # -- statistics ---------------------------------------------------------------------------------------------------

    def stage(self) -> None:
        """Give the taps somewhere to put their tokens."""
        for block in self.blocks:
            for index, stage in zip(block.indices, block.stages(self.settings.damping), strict=True):
                self.taps.stages[index] = stage

    def open_sketch(self, rank: int, groups: Groups, state: State) -> bool:
        """Begin to sketch the whitened gradient for ``rank`` directions a layer; False where that was done already."""
        self.stack(groups, state)
        if "sketch_range" in state[self.pairs[0].B]:
            return False
        for block in self.blocks:
            block.open_sketch(rank, state)
        groups[0]["ctr"]["sketched"] = 0
        return True

    def commit(self, finite: Tensor, agreed: Any) -> None:
        """Fold what the taps staged into the factors.

        Args:
            finite: ``()`` whether the step is to be taken.
            agreed: options that all processes must share.
        """
        if not self._looked:
            checks.check_agreement(agreed, self.blocks)
        world = distributed.add_up([t for block in self.blocks for t in block.staged])
        tokens = together([block.loss_tokens() for block in self.blocks]).amin()
        seen = torch.isfinite(tokens) & finite.to(tokens.device)
        if not self._looked:  # once: it waits for the device
            self._looked = True
            checks.warn_if_blind(tokens, finite.to(tokens.device), self.pairs)
        tokens = torch.where(seen, tokens, 1.0)
        # a sum's gradients are per token as they are; a mean was taken by each process of its own tokens
        summed = tokens / world if self.settings.loss_reduction == "mean" else torch.ones_like(tokens)
        loss_scale = grad_scale()  # a number stays one: as a tensor it would make the host wait
        scale = TokenScale(tokens, summed / (loss_scale.to(tokens) if isinstance(loss_scale, Tensor) else loss_scale))
        for block in self.blocks:
            block.commit(scale.to(block.H.device), self.settings.factor_decay, seen.to(block.H.device))

    def hold(self) -> None:
        """Where there is a bound, and the taps saw nothing in this step: layers never seen yet wait for them."""
        for block in self.blocks if self.taps.enabled else ():
            block.release()
        bounded = self.settings.max_kl is not None and self.taps.stages
        if bounded and not self.taps.enabled and self.blocks and self.blocks[0].b.gate is None:
            some_seen = together([block.b.tensors["factor_updates"].amax() for block in self.blocks]).amax() > 0
            for block in self.blocks:
                block.hold(some_seen.to(block.H.device))

    def renew_bases(self, shared: dict[str, Any]) -> None:
        """New eigenbases of the factors as they stand; ``shared``: the optimizer's numbers, which count failures."""
        failed = refresh_bases(self.blocks)
        if failed:
            shared["failed"] += failed
            warn_failed("an eigenbasis", "the layers keep the one that they have")

    def penalize_(self, deltas: dict[Stack, Tensor], finite: Tensor) -> None:
        """Add the decoupled step of the penalty on the way from the base model, where there is one, in place."""
        for block in self.blocks if self.settings.trust_penalty else ():
            block.penalize_(deltas, self.settings.trust_penalty, finite)

    def forms(
        self, deltas: dict[Stack, Tensor], known: tuple[Tensor, Tensor] | None, finite: Tensor, shared: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """``()`` the quadratic form of a step in the chosen curvature, and its slope; None where there is no curvature.

        Args:
            deltas: the step.
            known: both, of the part that the kernels took; None if they took none.
            finite: ``()`` whether it is to be taken.
            shared: the optimizer's numbers.
        """
        done = self.fused if known is not None else Fused(())
        rest = {stack: delta for stack, delta in deltas.items() if stack not in done.stacks}
        forms = [block.quadratic(deltas) for block in self.blocks if block not in done.blocks]
        if self.settings.curvature == "hutchinson" and self.probe is not None:
            if self.probe.enabled and distributed.everywhere(self.probe.ready, finite):
                hutchinson.sample(list(rest), self.probe.gradients, shared, self.settings.factor_decay)
            forms = [hutchinson.quadratic(stack, delta) for stack, delta in rest.items()]
        slopes = [slope(rest, finite)] if rest and (forms or known is not None) else []
        if known is not None:
            forms, slopes = [*forms, known[0]], [*slopes, known[1]]
        return (together(forms).sum(), together(slopes).sum()) if forms else None

    def forget(self) -> None:
        """Drop what the taps staged: the gradients that it belongs to are gone."""
        for block in self.blocks if self.taps.enabled else ():
            block.forget()

    def forget_dropped(self, groups: Groups) -> None:
        """The same where somebody else dropped the gradients: all are None or zero, so nothing was accumulated."""
        if not self.taps.enabled or self.fsdp or self._replaced(groups):  # FSDP keeps what it accumulates elsewhere
            return
        grads = [p.grad for pair in self.pairs for p in (pair.A, pair.B) if p.grad is not None]
        some = together([norm != 0 for norm in torch._foreach_norm(grads)]).any() if grads else None
        for block in self.blocks:
            block.forget(unless=some)


def _parameters(groups: Groups) -> list[nn.Parameter]:
    return [p for group in groups for p in group["params"]]


def _find(
    parameters: Sequence[nn.Parameter], model: nn.Module | None, settings: Settings
) -> tuple[list[nn.Module], list[LoRAPair]]:
    """The models that hold these parameters, or ``model``, and their LoRA layers of which these include B.

    Raises:
        ValueError, TypeError: for parameters and models that we cannot train.
    """
    roots = [model] if model is not None else find_roots(parameters)
    checks.check_parameters(parameters)
    checks.check_sharding(parameters, settings.curvature)
    checks.check_models(roots)
    ours = {id(p) for p in parameters}
    found = {id(pair.B): pair for root in roots for pair in find_pairs(root, parameters)}
    pairs = [pair for pair in found.values() if id(pair.B) in ours]
    if not pairs:
        warnings.warn(
            "CTROptimizer found no LoRA layers that own any of its parameters: it will train them as AdamW does. "
            "Build the optimizer after the adapters have been added to the model, and pass their parameters "
            "(or name the model: CTROptimizer(params, model=model)).",
            stacklevel=users_line(),
        )
    return roots, pairs


def _forward_begins(begins: Callable[[], Any], *_: Any) -> None:
    """A GradScaler skips ``step()`` on an overflow, and ``model.zero_grad()`` tells the optimizer nothing: look.

    Hooked to the whole model: checkpointing runs parts of it again during backward.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        begins()
