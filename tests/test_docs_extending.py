"""Runs every example of the page "Extending" without changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ctr_optim import CTROptimizer
from ctr_optim.curvature.factors import STRUCTURES, Dense
from ctr_optim.curvature.registry import CURVATURES
from ctr_optim.export.registry import EXPORTS
from ctr_optim.model.registry import LIBRARIES
from ctr_optim.trust_region.bound import BOUNDS

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
REGISTRIES: list[dict[str, Any]] = [STRUCTURES, CURVATURES, BOUNDS, LIBRARIES, EXPORTS]
SECTIONS = ["A factor structure", "A curvature", "A bound", "An adapter library", "An export"]


@pytest.fixture(autouse=True)
def _registries_as_they_were() -> Iterator[None]:
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def blocks(text: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S))


def run(heading: str) -> dict[str, Any]:
    """Run the page's shared setup and one example, and return the names that they define."""
    names: dict[str, Any] = {}
    exec(blocks(PAGE.split("\n## ")[0]) + blocks(PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]), names)
    return names


@torch.no_grad()
def loss(model: torch.nn.Module) -> float:
    """Return the loss on every token id."""
    ids = torch.arange(50)
    return float(torch.nn.functional.cross_entropy(model(ids), (7 * ids + 3) % 50))


def trained(model: torch.nn.Module, fresh: torch.nn.Module) -> None:
    """Assert that the loss is below that of an untrained model."""
    assert loss(model) < 0.97 * loss(fresh)


def test_every_section_is_run() -> None:
    assert re.findall(r"^## (.*)$", PAGE, flags=re.M)[: len(SECTIONS)] == SECTIONS


def test_every_registry_is_in_the_table() -> None:
    for name in ("STRUCTURES", "CURVATURES", "BOUNDS", "LIBRARIES", "EXPORTS"):
        file = re.search(rf"`{name}` in `(.*?)`", PAGE)
        assert file is not None
        assert re.search(rf"^{name}: dict", (Path(__file__).parents[1] / file[1]).read_text("utf-8"), flags=re.M)


def test_a_factor_structure() -> None:
    names = run("A factor structure")
    trained(names["model"], names["build"]())
    factors = {}
    for structure in ("blocks", "dense"):
        model = names["build"]()
        opt = CTROptimizer(model.parameters(), factor_structure=structure)
        names["train"](model, opt, steps=1)
        state = opt.state[opt.pairs[0].B]
        factors[structure] = STRUCTURES[structure](state[f"input_{STRUCTURES[structure].fields[0]}"])
    blocks, dense = factors["blocks"], factors["dense"]
    assert isinstance(dense, Dense)
    same_block = torch.arange(32)[:, None] // 16 == torch.arange(32) // 16
    expected = dense.to_dense() * same_block
    torch.testing.assert_close(blocks.to_dense(), expected)
    x = torch.randn(32, 3)
    torch.testing.assert_close(blocks.matmul(x), expected @ x)
    whitener = blocks.whitener(0.1)
    damped = expected + 0.1 * expected.diagonal().mean() * torch.eye(32)
    whitened = blocks.whiten(whitener, blocks.whiten(whitener, damped).mT)
    torch.testing.assert_close(whitened, torch.eye(32), atol=1e-3, rtol=0)


def test_a_curvature() -> None:
    names = run("A curvature")
    trained(names["model"], names["build"]())
    metrics = names["optimizer"].metrics()
    assert 0 < metrics["trust/predicted_kl"] <= metrics["trust/max_kl"] * (1 + 1e-4)
    assert metrics["trust/unbounded"] == 0 and metrics["trust/source"] == "measured"
    model = names["build"]()
    opt = CTROptimizer(model.parameters(), curvature="averaged")
    squares = torch.zeros_like(model[3].lora_B.weight)

    def add_square(*_: Any) -> None:
        squares.add_(model[3].lora_B.weight.grad.square())

    opt.register_step_pre_hook(add_square)
    names["train"](model, opt, steps=3)
    assert torch.equal(opt.state[model[3].lora_B.weight]["squares"], squares)
    again = CTROptimizer(names["build"]().parameters(), curvature="averaged")
    again.load_state_dict(opt.state_dict())
    assert torch.equal(again.state[again.param_groups[0]["params"][-1]]["squares"], squares)


def test_a_bound() -> None:
    names = run("A bound")
    model = names["build"]()
    opt = CTROptimizer(model.parameters(), kl_schedule="warm-up", max_kl=0.1)
    limits = []
    for _ in range(22):
        names["train"](model, opt, steps=1)
        limits.append(opt.metrics()["trust/max_kl"])
    assert limits == pytest.approx([0.1 * min(1, step / 20) for step in range(1, 23)])
    assert names["optimizer"].metrics()["trust/max_kl"] == pytest.approx(0.025)


def test_an_adapter_library() -> None:
    names = run("An adapter library")
    trained(names["model"], names["build"](names["Adapted"]))
    opt, model = names["optimizer"], names["model"]
    assert opt.ranks.keys() == {"1", "3"}
    for name, rank in opt.ranks.items():
        layer = model[int(name)]
        assert (layer.rank, layer.gain) == (len(layer.reduce.weight), 2.0 * layer.rank)
        assert rank <= layer.rank
    costs = {"1": 32 + 48, "3": 48 + 50}
    assert sum(opt.ranks[name] * cost for name, cost in costs.items()) <= 3 * sum(costs.values())


def test_an_export(capsys: pytest.CaptureFixture[str]) -> None:
    load = pytest.importorskip("safetensors.torch", reason="adapters are written with it").load_file
    names = run("An export")
    assert f"wrote {names['out']}: 2 layers" in capsys.readouterr().out
    delta = load(names["out"] / "delta.safetensors")
    for pair in names["optimizer"].pairs:
        torch.testing.assert_close(delta[pair.name], pair.B.detach() @ pair.A.detach())
        assert bool(delta[pair.name].any())


def test_unknown_names_are_refused_from_the_registries() -> None:
    names: dict[str, Any] = {}
    exec(blocks(PAGE.split("\n## ")[0]), names)
    for option, registry in (("factor_structure", STRUCTURES), ("curvature", CURVATURES), ("kl_schedule", BOUNDS)):
        with pytest.raises(ValueError, match=f"{option}: got 'unheard'.*{', '.join(map(repr, registry))}"):
            CTROptimizer(names["build"]().parameters(), **{option: "unheard"})
