"""During training, the model can be copied, pickled and saved as a whole."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    Net,
    assert_factors,
    backward,
    batch,
    factors_of,
    llama_batch,
    llama_loss,
    needs_newer_compiler,
    net,
    optimizer,
    same,
    snapshot,
    tiny_llama,
    train,
)


def through_torch(model: Net) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch])
def test_a_copy_is_a_model_like_any_other(copied: Callable[[Net], Net]) -> None:
    model = net(rank=3)
    opt = optimizer(model, rank_scheduler={"interval": 4, "window": 4}, calibration_interval=1)
    train(model, opt, 2)
    clone = copied(model)
    assert same(snapshot(clone), snapshot(model))
    assert torch.equal(clone(batch()[0]), model(batch()[0]))
    before = factors_of(opt)
    train(clone, torch.optim.SGD(clone.parameters(), lr=0.1), 2)  # the hooks of the copy do nothing
    opt.zero_grad()
    assert all(torch.equal(f[k], factors_of(opt)[n][k]) for n, f in before.items() for k in f)
    with pytest.raises(RuntimeError, match="size mismatch"):
        clone.load_state_dict(net(rank=2).state_dict())
    own = optimizer(clone, rank_scheduler={"interval": 4, "window": 4})
    train(clone, own, 5)
    assert own.metrics()["ranks"].keys() == {"up", "down"}
    train(model, opt, 3, start=2)


@needs_newer_compiler
def test_a_compiled_model_stays_one_graph() -> None:
    pytest.importorskip("peft", reason="the adapters are PEFT's")
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        model = tiny_llama(torch.float32)
        opt = optimizer(model, rank_scheduler={"interval": 50})
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for step in range(2):
            llama_loss(called, llama_batch(step)).backward()
            opt.step()
            opt.zero_grad()
        found.append(factors_of(opt))
    assert_factors(found[1], found[0], 1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("what", ["step", "training"])
def test_steps_within_a_compiled_function_are_the_same_steps(what: str) -> None:
    """Compiles ``step()`` or a whole loop body; the graph breaks at the optimizer, as for torch's optimizers."""
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        model = net(dtype=torch.float32)
        opt = optimizer(model, calibration_interval=2, factor_interval=2)

        def training(step: int, model: Any = model, opt: Any = opt) -> None:
            backward(model, batch(step))
            opt.step()
            opt.zero_grad()

        if compiled and what == "step":
            opt.step = torch.compile(opt.step, backend="eager")
        call = torch.compile(training, backend="eager") if compiled and what == "training" else training
        for step in range(6):
            call(step)
        found.append((snapshot(model), opt.metrics()))
    (weights, plain), (others, compiled_metrics) = found
    assert same(weights, others) and plain.keys() == compiled_metrics.keys()
    # A compiled graph stores a slice of fixed size, so the coupling is measured on other rows.
    measured = (
        {"trust/coupling", "trust/predicted_kl", "kl_from_base", "kl_from_base/layer"} if what == "training" else set()
    )
    assert all(plain[name] == compiled_metrics[name] for name in plain.keys() - measured)
    torch.compiler.reset()
