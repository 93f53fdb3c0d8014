"""Stacks: parameters of one shape, with each entry of their optimizer state in one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.direction.adam import adam_, change_basis_, rotate, unrotate
from ctr_optim.model import coordinates
from ctr_optim.runtime import distributed
from ctr_optim.runtime.devices import together


class Stack:
    """Parameters of one shape, dtype, device and group, with each entry of their state stacked in one tensor.

    The tensors in ``optimizer.state[p]``, which checkpoints save, are views into the stacked tensors. Code that
    replaces these views (loading, resizing) must drop the stacks; the next step builds new ones.

    Args:
        params: L parameters.
        group: their parameter group.
        state: the optimizer's state.
        rank_dim: dimension of the LoRA rank: -2 for A, -1 for B; None for a parameter outside LoRA layers.
    """

    def __init__(self, params: Sequence[nn.Parameter], group: dict[str, Any], state: Any, rank_dim: int | None) -> None:
        self.params, self.group, self.rank_dim = list(params), group, rank_dim
        for p in self.params:
            if not state[p]:
                state[p].update(initial_state(p, rank_dim))
        self.tensors: dict[str, Tensor] = {}
        for key in state[self.params[0]]:
            self.tensors[key] = torch.stack([distributed.local(state[p][key]) for p in self.params])
        self._share(state)

    def _share(self, state: Any) -> None:
        for key, stacked in self.tensors.items():
            for p, part in zip(self.params, stacked, strict=True):
                state[p][key] = distributed.as_parts(part, state[p][key])

    def to_(self, device: torch.device, state: Any) -> None:
        """Move the state to ``device`` if it is on another device."""
        if device != self.device:
            self.tensors = {key: stacked.to(device) for key, stacked in self.tensors.items()}
            self._share(state)

    def hold(self, key: str, stacked: Tensor, state: Any) -> None:
        """Add a tensor ``(L, ...)`` to the state under the name ``key``. Every process holds it whole."""
        self.tensors[key] = stacked
        for p, tensor in zip(self.params, stacked.unbind(0), strict=True):
            state[p][key] = tensor

    @property
    def device(self) -> torch.device:
        """The device of the state."""
        return self.tensors["step"].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state: float32 at least."""
        return self.tensors["exp_avg"].dtype

    @property
    def retained(self) -> bool:
        """Whether the moments use the coordinates of retained text (:mod:`ctr_optim.model.coordinates`)."""
        return coordinates.VECTORS in self.tensors

    def values(self) -> Tensor:
        """Return the parameters ``(L, *shape)`` in the dtype of the state."""
        return self._stacked([p.detach() for p in self.params]).to(self.dtype)

    def gradients(self, finite: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the gradients ``(L, *shape)`` and :meth:`live` ``(L,)``; None if no parameter has a gradient.

        The gradients have the dtype of the state and the sign of a minimization. Missing gradients are zero, and all
        gradients are zero unless ``finite``.
        """
        grads = [p.grad for p in self.params]
        missing = [g is None for g in grads]
        if all(missing):
            return None
        zero = torch.zeros_like(self.params[0]) if any(missing) else None
        stacked = self._stacked([zero if g is None else g for g in grads]).to(self.dtype)  # type: ignore[misc]
        stacked = torch.where(finite.to(stacked.device), -stacked if self.group["maximize"] else stacked, 0)
        return stacked, self.live(finite)

    def live(self, finite: Tensor) -> Tensor:
        """Return ``(L,)``: 1 for each parameter that this step moves; 0 without a gradient, or if not ``finite``."""
        live = finite.to(self.tensors["step"]).expand(len(self.params))
        present = [p.grad is not None for p in self.params]
        return live if all(present) else live * torch.tensor(present, dtype=live.dtype, device="cpu").to(live.device)

    def direction(self, finite: Tensor, penalty: Tensor | None = None) -> Tensor | None:
        """Update the moments, and return Adam's step with decoupled weight decay ``(L, *shape)``; None if no gradients.

        Args:
            finite: ``()`` whether all gradients are finite; if not, the moments stay and the step is zero.
            penalty: ``(L, *shape)`` gradient that is added to the loss's gradient.
        """
        found = self.gradients(finite)
        if found is None:
            return None
        grad, live = found
        t, group = self.tensors, self.group
        if penalty is not None:
            grad = grad + penalty * (live > 0)[:, None, None]
        grad = self._turned(grad)
        delta, factor = adam_(grad, t["exp_avg"], t["exp_avg_sq"], t["step"], live, group["betas"], group["eps"])
        factor = factor * -group["lr"]
        if self.rank_dim is None:
            delta *= factor
        else:
            delta = unrotate(delta, t["basis"] * factor, self.rank_dim)
        if self.retained:
            delta = coordinates.product(delta, t)
        if group["weight_decay"] != 0:
            delta -= self.values() * (group["lr"] * group["weight_decay"] * live.view(factor.shape).to(delta.dtype))
        return delta

    def _turned(self, grad: Tensor) -> Tensor:
        """Return a gradient ``(L, *shape)`` in the coordinates of the moments."""
        grad = coordinates.product(grad, self.tensors) if self.retained else grad
        return grad if self.rank_dim is None else rotate(grad, self.tensors["basis"], self.rank_dim)

    def preconditioned(self, grad: Tensor) -> Tensor:
        """Return ``P^-1 g (L, *shape)`` for a gradient g ``(L, *shape)``; Adam's step is ``-P^-1 m`` without decay.

        ``P`` is ``(sqrt(v^) + eps) / lr`` in the coordinates of the moments. In a parameter without a step so far, it
        is infinite.
        """
        t, group = self.tensors, self.group
        wide = (-1,) + (1,) * (grad.dim() - 1)
        count = t["step"].double().view(wide)
        correction = (1 - group["betas"][1] ** count.clamp_min(1)).sqrt().to(self.dtype)
        inverse = (count > 0) * group["lr"] / ((t["exp_avg_sq"].sqrt() / correction) + group["eps"])
        found = self._turned(grad.to(self.dtype)) * inverse.to(self.dtype)
        found = found if self.rank_dim is None else unrotate(found, t["basis"], self.rank_dim)
        return coordinates.product(found, t) if self.retained else found

    def newest(self) -> Tensor | None:
        """Return this step's gradients ``(L, *shape)`` in the coordinates of the moments; None without gradients."""
        found = self.gradients(torch.ones((), dtype=torch.bool, device=self.device))
        return None if found is None else self._turned(found[0])

    def coordinates(self, delta: Tensor) -> Tensor:
        """Return a step ``(L, *shape)`` in the coordinates of the moments."""
        delta = coordinates.solve(delta, self.tensors) if self.retained else delta
        return delta if self.rank_dim is None else rotate(delta, self.tensors["basis"], self.rank_dim)

    def slope(self, delta: Tensor) -> Tensor:
        """Return ``()`` this process's term of the objective's derivative along a step ``(L, *shape)``.

        The objective is what the optimizer minimizes: the loss, or the negative loss with ``maximize``.
        """
        grads, steps = [], []
        for p, step in zip(self.params, self.parts(delta)[1], strict=True):
            if p.grad is not None:
                grads.append(distributed.local(p.grad).flatten())
                steps.append(step.flatten())
        slope: Tensor = torch.linalg.vecdot(torch.stack(grads).to(delta.dtype), torch.stack(steps)).sum()
        return -slope if self.group["maximize"] else slope

    def set_basis(self, basis: Tensor) -> None:
        """Change to a new eigenbasis ``(L, r, r)``, and transform the moments into it."""
        t = self.tensors
        assert self.rank_dim is not None
        change_basis_(t["exp_avg"], t["exp_avg_sq"], t["basis"], basis, self.rank_dim)
        t["basis"].copy_(basis)

    def move_(self, delta: Tensor, scale: Tensor | None) -> None:
        """Apply ``p <- p + scale delta``, computed in the wider of the two dtypes; ``scale=None`` means 1."""
        params, parts = self.parts(delta if scale is None else delta * scale.to(delta))
        torch._foreach_add_([p.data for p in params], parts)

    def parts(self, delta: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return this process's shards of the parameters and of a step ``(L, *shape)``."""
        cut = list(delta.unbind(0)) if self.rank_dim is None else distributed.parts(delta, self.params[0])
        return [distributed.local(p) for p in self.params], cut

    def _stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        """Stack LoRA weights whole on every process, and shards of all other parameters, which may be large."""
        if self.rank_dim is None:
            return torch.stack([distributed.local(t) for t in tensors])
        return distributed.stack_whole(tensors)


def slope(deltas: Mapping[Stack, Tensor], finite: Tensor) -> Tensor:
    """Return ``()`` the objective's derivative along a step: the product of gradient and step over all parameters.

    Args:
        deltas: the step, ``(L, *shape)`` for each stack.
        finite: ``()`` whether all gradients are finite; if not, the result is 0.
    """
    whole = [stack.slope(delta) for stack, delta in deltas.items() if not distributed.is_sharded(stack.params[0])]
    parts = {stack: stack.slope(delta) for stack, delta in deltas.items() if distributed.is_sharded(stack.params[0])}
    if parts:
        whole.append(distributed.sum_over_parts(together(list(parts.values())).sum(), next(iter(parts)).params[0]))
    slope = together(whole).sum()
    return torch.where(finite.to(slope.device), slope, 0)


def initial_state(p: nn.Parameter, rank_dim: int | None) -> dict[str, Tensor]:
    """Return the initial state of a parameter, in float32 or wider even for half-precision parameters.

    Args:
        p: the parameter.
        rank_dim: dimension of the LoRA rank: -2 for A, -1 for B; None for a parameter outside LoRA layers.
    """
    dtype = torch.promote_types(p.dtype, torch.float32)
    like = p if rank_dim is None else torch.empty(p.shape, device=p.device)  # every process holds LoRA state whole
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=p.device),
        "exp_avg": torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format),
    }
    if rank_dim is not None:
        state["basis"] = torch.eye(p.shape[rank_dim], dtype=dtype, device=p.device)
    return state
