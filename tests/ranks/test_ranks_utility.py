"""Utilities of directions, compared with dense singular value decompositions."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import LoRALinear, backward, batch, factors_of, lora_layers, loss_of, net, optimizer, relative_error
from torch import Tensor

from ctr_optim.curvature.factors import STRUCTURES
from ctr_optim.ranks.allocation import survey
from ctr_optim.ranks.valuation import absent_directions, existing_directions, extrapolate

SEEDS = st.integers(0, 10_000)


def spd(width: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(width, width + 2, generator=generator, dtype=torch.float64)
    return root @ root.mT / width


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.mT


def layer(seed: int, rank: int, d_in: int = 9, d_out: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return A, B, C and S."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, d_in, generator=g, dtype=torch.float64)
    b = torch.randn(d_out, rank, generator=g, dtype=torch.float64)
    return a, b, spd(d_in, g), spd(d_out, g)


@given(SEEDS, st.integers(1, 6))
def test_existing_directions_are_the_fisher_weighted_singular_values(seed: int, rank: int) -> None:
    a, b, C, S = layer(seed, rank)
    dense = power(S, 0.5) @ b @ a @ power(C, 0.5)
    singular = torch.linalg.svdvals(dense)
    found = existing_directions(a @ C @ a.mT, b.mT @ S @ b)
    torch.testing.assert_close((2 * found.utility).sqrt(), singular[:rank], rtol=1e-6, atol=1e-6 * float(singular[0]))
    for count in range(rank + 1):
        kept = power(S, 0.5) @ (b @ found.restore[:, :count]) @ (found.keep[:count] @ a) @ power(C, 0.5)
        best = singular[count:].square().sum().sqrt()  # the smallest possible error, by Eckart and Young
        assert float((dense - kept).norm()) == pytest.approx(float(best), rel=1e-6, abs=1e-6 * float(singular[0]))


@given(SEEDS, st.integers(1, 5), st.sampled_from(["a", "b"]))
def test_directions_that_do_nothing_are_worth_nothing(seed: int, rank: int, side: str) -> None:
    a, b, C, S = layer(seed, rank + 1)
    if side == "a":
        a[rank] = a[:rank].sum(0)  # a row in the span of the others
    else:
        b[:, rank] = 0
    utility = existing_directions(a @ C @ a.mT, b.mT @ S @ b).utility
    assert float(utility[-1]) < 1e-8 * float(utility[0])


def test_a_fresh_layer_is_worth_nothing_and_stays_finite() -> None:
    a, _, C, _ = layer(0, 3)
    found = existing_directions(a @ C @ a.mT, torch.zeros(3, 3, dtype=torch.float64))
    assert found.utility.abs().max() == 0 and found.keep.isfinite().all() and found.restore.isfinite().all()
    found = existing_directions(torch.zeros(3, 3), torch.zeros(3, 3))
    assert all(t.isfinite().all() for t in (found.utility, found.keep, found.restore))


def sketch_of(G: Tensor, columns: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``G Omega``, ``Psi^T G`` and Psi."""
    omega = torch.randn(G.shape[1], columns, generator=g, dtype=torch.float64)
    psi = torch.randn(G.shape[0], 2 * columns, generator=g, dtype=torch.float64)
    return G @ omega, psi.mT @ G, psi


@given(SEEDS, st.integers(1, 4))
def test_a_sketch_wide_enough_is_exact(seed: int, rank: int) -> None:
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(11, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, 8, generator=g).double()
    utility, vectors = absent_directions(*sketch_of(G, 5, g), torch.zeros(8, 2).double(), torch.zeros(11, 2).double())
    singular = torch.linalg.svdvals(G)
    torch.testing.assert_close((2 * utility).sqrt(), singular[:5], rtol=1e-6, atol=1e-6 * float(singular[0]))
    assert relative_error(G @ vectors @ vectors.mT, G) < 1e-6


@given(SEEDS, st.integers(1, 4))
def test_absent_directions_are_those_that_the_adapter_cannot_reach(seed: int, rank: int) -> None:
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(11, 6, generator=g, dtype=torch.float64) @ torch.randn(6, 9, generator=g, dtype=torch.float64)
    rows = torch.randn(9, rank, generator=g, dtype=torch.float64)
    columns = torch.randn(11, rank, generator=g, dtype=torch.float64)
    columns[:, -1] = 0  # a new direction, whose column in B is still zero
    utility, vectors = absent_directions(*sketch_of(G, 6, g)[:3], rows, columns)
    out = torch.eye(11).double() - columns @ torch.linalg.pinv(columns)
    into = torch.eye(9).double() - rows @ torch.linalg.pinv(rows)
    dense = out @ G @ into
    singular = torch.linalg.svdvals(dense)[:6]
    top = float(singular[0])
    torch.testing.assert_close(utility, 0.5 * singular**2, rtol=1e-6, atol=1e-8 * top**2)
    torch.testing.assert_close((dense @ vectors).norm(dim=0), singular, rtol=1e-5, atol=1e-6 * top)


def test_a_sketch_of_nothing_offers_no_direction() -> None:
    nothing = torch.zeros(2, 11, 3), torch.zeros(2, 6, 9), torch.randn(11, 6)
    utility, vectors = absent_directions(*nothing, torch.randn(2, 9, 2), torch.zeros(2, 11, 2))
    assert utility.shape == (2, 3) and utility.abs().max() == vectors.abs().max() == 0


@given(st.lists(st.floats(0, 10), max_size=5), st.integers(0, 4))
def test_the_next_utilities_go_on_falling(values: list[float], count: int) -> None:
    values = sorted(values, reverse=True)
    found = extrapolate(values, count)
    assert len(found) == count
    assert sorted(values + found, reverse=True) == values + found


@pytest.mark.parametrize("structure", ["diagonal", "dense", "lowrank"])
def test_the_taps_sketch_the_whitened_gradient(structure: str) -> None:
    """The sketch of two steps with two micro-batches each matches the dense gradient of every layer's weight."""
    model, damping = net(), 0.1
    opt = optimizer(model, factor_structure=structure, damping=damping, lr=0.0, max_kl=None)
    backward(model, batch(9))
    opt.step()
    opt.zero_grad()
    opt.open_sketch(3)
    expected: dict[str, Tensor] = {}
    for step in range(2):
        factors = factors_of(opt)
        blocks = {pair.name: (block, i) for block in opt.blocks for i, pair in enumerate(block.pairs)}
        grads: dict[str, Tensor] = {}
        for micro in range(2):
            ids, labels = batch(10 * step + micro)
            for module in lora_layers(model).values():
                module.base.weight.requires_grad_(True)
            got = torch.autograd.grad(
                loss_of(model(ids), labels) / 2, [m.base.weight for m in lora_layers(model).values()]
            )
            for (name, module), g in zip(lora_layers(model).items(), got, strict=True):
                module.base.weight.requires_grad_(False)
                grads[name] = grads.get(name, 0) + module.scaling * g
        for name, g in grads.items():
            block, i = blocks[name]
            w_in, w_out = ([w[i] for w in ws] if isinstance(ws, tuple) else ws[i] for ws in block.whiteners(damping))
            whiten = STRUCTURES[structure].whiten
            whitened = whiten(w_out, whiten(w_in, g.mT).mT)
            if structure == "dense":
                C, S = (
                    f + damping * f.diagonal().mean() * torch.eye(len(f)).double()
                    for f in (factors[name][k] for k in "CS")
                )
                assert relative_error(whitened, power(S, -0.5) @ g @ power(C, -0.5)) < 1e-8
            expected[name] = expected.get(name, 0) + whitened
        opt.zero_grad()  # the oracle's backward pass went through the hooks, too
        for micro in range(2):
            backward(model, batch(10 * step + micro), weight=0.5)
        opt.step()
        opt.zero_grad()
    for block in opt.blocks:
        omega, psi = block.test_matrices()
        for i, pair in enumerate(block.pairs):
            assert relative_error(block.sketch[0][i], expected[pair.name] @ omega) < 1e-9
            assert relative_error(block.sketch[1][i], psi.mT @ expected[pair.name]) < 1e-9


def test_new_rows_are_what_the_layer_lacks_and_as_long_as_its_own() -> None:
    model = net()
    opt = optimizer(model, factor_structure="dense", lr=0.0, max_kl=None)
    backward(model, batch(0))
    opt.step()
    opt.open_sketch(2)
    backward(model, batch(0))
    opt.step()
    factors = factors_of(opt)
    for fresh in (False, True):
        for s in (s for block in opt.blocks for s in survey(block, 1, 0.1, fresh)):
            norm = s.pair.A.detach().norm(dim=-1).mean()
            torch.testing.assert_close(s.rows.norm(dim=-1), norm.expand(len(s.rows)))
            C, a = factors[s.pair.name]["C"], s.pair.A.detach()
            torch.testing.assert_close(s.cross, a @ C @ s.rows.mT)
            torch.testing.assert_close(s.inner, s.rows @ C @ s.rows.mT)
            strength = float(s.cross[:, 0].norm() / (a @ C @ a.mT).norm())
            assert (strength < 1e-9) != fresh  # A's span counts as absent only in an untrained layer


@pytest.mark.parametrize("structure", ["diagonal", "dense", "lowrank"])
def test_layers_surveyed_together_are_what_each_is_alone(structure: str) -> None:
    """A block of three layers with different ranks in use gives the same surveys as three blocks of one layer."""
    torch.manual_seed(0)
    layers = {f"l{i}": LoRALinear(30, 24, 4, 2.0).double() for i in range(3)}
    in_use = {"l0": 4, "l1": 2, "l2": 4}
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.lora_B.weight)
        with torch.no_grad():
            layer.lora_A.weight[in_use[name] :], layer.lora_B.weight[:, in_use[name] :] = 0, 0
    found = []
    for foreach in (None, False):
        model = copy.deepcopy(torch.nn.ModuleDict(layers))
        opt = optimizer(model, factor_structure=structure, lr=0.0, max_kl=None, foreach=foreach)
        opt.open_sketch(2)
        for step in range(2):
            x = torch.randn(20, 30, generator=torch.Generator().manual_seed(step)).double()
            sum(layer(x).tanh().square().mean() for layer in model.values()).backward()
            opt.step()
            opt.zero_grad()
        assert len(opt.blocks) == (3 if foreach is False else 1)
        found.append([s for block in opt.blocks for s in survey(block, 2, 0.1, ranks=in_use)])
    for one, other in zip(*found, strict=True):
        assert one.pair.name == other.pair.name and one.rank == other.rank == in_use[one.pair.name]
        for name in ("absent", "rows", "cross", "inner"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(one.existing.utility, other.existing.utility)
        torch.testing.assert_close(one.existing.restore @ one.existing.keep, torch.eye(one.rank).double())
        for name in ("H", "D", "basis_a", "basis_b"):
            torch.testing.assert_close(getattr(one.core, name), getattr(other.core, name))
        torch.testing.assert_close(one.typical, other.typical)


@given(SEEDS)
def test_what_single_precision_knows_survives_its_gram_matrices(seed: int) -> None:
    """For singular values over five decades in float32, the result is as good as a decomposition of the sketch."""
    g = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(60, 6, generator=g, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(50, 6, generator=g, dtype=torch.float64))
    singular = 10.0 ** -torch.arange(6).double()
    range_, corange, psi = sketch_of((left * singular) @ right.mT, 10, g)
    rows, columns = torch.zeros(50, 1), torch.zeros(60, 1)
    utility, vectors = absent_directions(range_.float(), corange.float(), psi.float(), rows, columns)
    torch.testing.assert_close((2 * utility[:5]).sqrt(), singular[:5], rtol=2e-2, atol=2e-6)
    overlap = (vectors[:, :4].double() * right[:, :4]).sum(0).abs()
    assert overlap.min() > 0.999
