"""A state machine performs user actions in random order, and checks invariants after each of them.

A small network has two PEFT adapters whose ranks change. Hypothesis chooses among stepping, accumulating, evaluating,
saving, loading, adding a parameter group, freezing, switching adapters, changing the learning rate, copying, and
gradients that are not finite.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import VOCAB, batch, loss_of, same, snapshot
from torch import Tensor, nn

from ctr_optim import CTROptimizer
from ctr_optim.ranks import allocation

peft = pytest.importorskip("peft", reason="the machine switches PEFT adapters")

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_load_state_dict_pre_hooks")
RANKS: dict[str, Any] = dict(interval=3, window=2, hysteresis=0.0, sketch_rank=3, max_rank=6)


class Base(nn.Module):
    """Model that maps token ids to logits through two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(VOCAB, 8), nn.Linear(8, 10), nn.Linear(10, 7)
        self.head = nn.Linear(7, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.embed(ids)).tanh()).tanh())


def build() -> nn.Module:
    """Return the network with the adapters ``default`` and ``other``, with B different from zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["up", "down"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Base(), config)
        model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["up", "down"]))
    return model


def optimizer_for(model: nn.Module) -> CTROptimizer:
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    return CTROptimizer(
        adapters, model=model, max_kl=1e-3, factor_interval=2, basis_interval=3, calibration_interval=3,
        weight_decay=0.01, rank_scheduler=RANKS, average=True,
    )  # fmt: skip


def hooks(model: nn.Module) -> int:
    """Return the number of active hooks; those of a copied model are inactive."""
    found = [(m, hook) for m in model.modules() for kind in HOOKS for hook in getattr(m, kind).values()]
    inner = [(m, getattr(hook, "hook", hook)) for m, hook in found]  # torch wraps the hooks for loading.
    return sum(getattr(hook, "owner", id(m)) == id(m) for m, hook in inner)


def continuous(resize: Callable[..., None]) -> Callable[..., None]:
    """Check a rank event: growth does not change the function, and a cut removes the least energy."""

    def energy(factors: dict[str, Tensor]) -> Tensor:
        return factors["rank_output"].double() @ factors["rank_input"].double()

    def watched(some: Any, kept: int, added: int, state: Callable[[Tensor], Any], *rest: Any, **more: Any) -> None:
        before = [((s.pair.B @ s.pair.A).detach(), s.pair.rank, energy(state(s.pair.B))) for s in some]
        resize(some, kept, added, state, *rest, **more)
        for s, (old, rank, had) in zip(some, before, strict=True):
            assert s.pair.rank == kept + added
            if kept == rank:
                assert ((s.pair.B @ s.pair.A).detach() - old).norm() <= 1e-5 * old.norm()
            best = torch.linalg.eigvals(had).real.sort(descending=True).values[:kept].sum()
            assert abs(energy(state(s.pair.B)).trace() - best) <= 1e-5 * had.trace().clamp_min(1e-30)

    return watched


class Machine(RuleBasedStateMachine):
    """State machine with a model, its optimizer and saved checkpoints."""

    @initialize()
    def begin(self) -> None:
        self.patch = mock.patch.object(allocation, "resize", continuous(allocation.resize))
        self.patch.start()
        self.model = build()
        self.opt = optimizer_for(self.model)
        self.budget, self.hooks = self.parameters(), hooks(self.model)
        self.saved: tuple[bytes, int, dict[str, Tensor]] | None = None
        self.clock, self.grown, self.stepped = 0, False, False

    def parameters(self) -> int:
        return sum(pair.A.numel() + pair.B.numel() for pair in self.opt.pairs)

    def backward(self, weight: float = 1.0) -> None:
        ids, labels = batch(self.clock)
        self.clock += 1
        (weight * loss_of(self.model(ids), labels)).backward()

    def step(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.opt.step()
        self.opt.zero_grad()
        self.stepped = True

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.backward()
            self.step()

    @rule(count=st.integers(2, 3), clear=st.booleans())
    def accumulate(self, count: int, clear: bool) -> None:
        if clear:  # The gradients are cleared without a step.
            self.backward()
            self.model.zero_grad()
        for _ in range(count):
            self.backward(1 / count)
        self.step()

    @rule(bad=st.sampled_from([math.nan, math.inf]))
    def bad_gradient(self, bad: float) -> None:
        before = snapshot(self.model)
        self.backward(bad)
        with mock.patch.object(self.opt._ranks, "event", return_value=[]):  # A rank event may follow a skipped step.
            self.step()
        assert same(before, snapshot(self.model))

    @rule()
    def evaluate(self) -> None:
        weights, state = snapshot(self.model), copy.deepcopy(self.opt.state_dict())
        self.model.eval()
        with torch.no_grad(), self.opt.averaged():
            self.model(batch(self.clock)[0])
        self.model.train()
        assert same(weights, snapshot(self.model)) and str(state) == str(self.opt.state_dict())

    @rule(averaged=st.booleans())
    def save(self, averaged: bool) -> None:
        file, weights = io.BytesIO(), snapshot(self.model)
        with self.opt.averaged() if averaged else contextlib.nullcontext():
            torch.save({"model": self.model.state_dict(), "optimizer": self.opt.state_dict()}, file)
        self.saved = file.getvalue(), len(self.opt.param_groups), weights

    @precondition(lambda self: self.saved is not None)
    @rule(fresh=st.booleans())
    def load(self, fresh: bool) -> None:
        assert self.saved is not None
        saved = torch.load(io.BytesIO(self.saved[0]), weights_only=True)
        if fresh:
            self.opt.close()
            self.model = build()
            self.opt, self.grown = optimizer_for(self.model), False
        if self.saved[1] > len(self.opt.param_groups):
            self.add_group()
        self.model.load_state_dict(saved["model"])
        if self.saved[1] < len(self.opt.param_groups):
            with pytest.raises(ValueError, match="parameter groups"):
                self.opt.load_state_dict(saved["optimizer"])
            self.opt.close()
            self.opt, self.grown = optimizer_for(self.model), False
        self.opt.load_state_dict(saved["optimizer"])
        loaded = self.opt.state_dict()
        assert str(loaded["param_groups"]) == str(saved["optimizer"]["param_groups"])
        assert all(str(loaded["state"][key]) == str(entry) for key, entry in saved["optimizer"]["state"].items())
        self.opt.use_training()
        before = self.saved[2]  # without the parameters that were frozen
        assert all(torch.equal(p, before[name]) for name, p in snapshot(self.model).items() if name in before)
        self.stepped = False  # Checkpoints do not contain the metrics of the last step.

    @precondition(lambda self: not self.grown)
    @rule()
    def add_group(self) -> None:
        head = self.model.base_model.model.head
        self.opt.add_param_group({"params": list(head.requires_grad_(True).parameters()), "lr": 1e-3})
        self.grown = True

    @rule(index=st.integers(0, 3), on=st.booleans())
    def freeze(self, index: int, on: bool) -> None:
        pair = self.opt.pairs[index]
        for p in (pair.A, pair.B):
            p.requires_grad_(not on)
            p.grad = None

    @rule(name=st.sampled_from(["default", "other"]))
    def switch(self, name: str) -> None:
        self.model.set_adapter(name)

    @rule(lr=st.sampled_from([0.0, 1e-3, 2e-2, 0.5]))
    def change_lr(self, lr: float) -> None:
        self.opt.param_groups[0]["lr"] = lr

    @rule()
    def deepcopy(self) -> None:
        clone, other = copy.deepcopy((self.model, self.opt))
        assert same(snapshot(clone), snapshot(self.model)) and str(other.state_dict()) == str(self.opt.state_dict())
        self.opt.close()
        assert not hooks(self.model)
        self.model, self.opt, self.stepped = clone, other, False

    @invariant()
    def the_constraint_holds(self) -> None:
        if self.stepped:
            metrics = self.opt.metrics()
            assert 0 <= metrics["trust/predicted_kl"] <= metrics["trust/max_kl"] * (1 + 1e-4)
            assert 0 <= metrics["trust/scale"] <= 1

    @invariant()
    def the_budget_holds(self) -> None:
        assert self.parameters() <= self.budget
        assert all(1 <= pair.rank <= 6 for pair in self.opt.pairs)

    @invariant()
    def shapes_and_bookkeeping_are_right(self) -> None:
        for pair in self.opt.pairs:
            rank = pair.rank
            assert pair.B.shape[1] == rank == pair.layer.r[pair.adapter]
            for p in (pair.A, pair.B):
                assert p.grad is None or p.grad.shape == p.shape
                state = self.opt.state.get(p) or {}
                assert all(state[k].shape == p.shape for k in ("exp_avg", "exp_avg_sq") if k in state)
                assert all(state[k].shape == (rank, rank) for k in ("basis", "rank_input", "rank_output") if k in state)
                assert all(t.isfinite().all() for t in state.values()) and p.isfinite().all()
                if "basis" in state:
                    torch.testing.assert_close(state["basis"].mT @ state["basis"], torch.eye(rank), atol=1e-4, rtol=0)

    @invariant()
    def no_hook_is_left_over(self) -> None:
        assert hooks(self.model) == self.hooks

    def teardown(self) -> None:
        if not hasattr(self, "opt"):
            return
        self.patch.stop()
        ghosts = [weakref.ref(self.opt), weakref.ref(self.opt.pairs[0].A)]
        model, self.opt = self.model, None  # type: ignore[assignment]
        gc.collect()
        assert ghosts[0]() is None and not hooks(model)
        del model, self.model
        gc.collect()
        assert ghosts[1]() is None


Machine.TestCase.settings = settings(
    max_examples=8, stateful_step_count=20, deadline=None, phases=(Phase.explicit, Phase.generate)
)
TestMachine = Machine.TestCase


def test_live_memory_is_flat_over_all_of_it() -> None:
    """Repeated actions do not accumulate tensors."""
    machine = Machine()
    machine.begin()
    counts = []
    for _ in range(4):
        machine.steps(4)
        machine.accumulate(2, True)
        machine.bad_gradient(math.nan)
        machine.evaluate()
        machine.save(True)
        machine.freeze(0, True)
        machine.switch("other")
        machine.steps(2)
        machine.freeze(0, False)
        machine.switch("default")
        machine.load(True)
        machine.deepcopy()
        gc.collect()
        counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    machine.teardown()
    assert counts[-1] <= counts[1] + 5
