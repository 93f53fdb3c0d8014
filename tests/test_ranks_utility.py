"""What directions are worth: against dense singular value decompositions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import backward, batch, factors_of, lora_layers, loss_of, net, optimizer, relative_error
from torch import Tensor

from ctr_optim.curvature.factors import STRUCTURES
from ctr_optim.ranks.reallocation import extrapolate, survey
from ctr_optim.ranks.utility import absent_directions, existing_directions, reconstruct

SEEDS = st.integers(0, 10_000)


def spd(width: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(width, width + 2, generator=generator, dtype=torch.float64)
    return root @ root.mT / width


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.mT


def layer(seed: int, rank: int, d_in: int = 9, d_out: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, C and S."""
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
        best = singular[count:].square().sum().sqrt()  # Eckart and Young
        assert float((dense - kept).norm()) == pytest.approx(float(best), rel=1e-6, abs=1e-6 * float(singular[0]))


@given(SEEDS, st.integers(1, 5), st.sampled_from(["a", "b"]))
def test_directions_that_do_nothing_are_worth_nothing(seed: int, rank: int, side: str) -> None:
    a, b, C, S = layer(seed, rank + 1)
    if side == "a":
        a[rank] = a[:rank].sum(0)  # a row that the others span
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


@given(SEEDS, st.integers(1, 4))
def test_a_sketch_wide_enough_is_exact(seed: int, rank: int) -> None:
    g = torch.Generator().manual_seed(seed)
    d_out, d_in = 11, 8
    G = torch.randn(d_out, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, d_in, generator=g).double()
    omega = torch.randn(d_in, 5, generator=g, dtype=torch.float64)
    psi = torch.randn(d_out, 10, generator=g, dtype=torch.float64)
    q, x = reconstruct(G @ omega, psi.mT @ G, psi)
    assert relative_error(q @ x, G) < 1e-6


@given(SEEDS, st.integers(1, 4))
def test_absent_directions_are_those_that_the_adapter_cannot_reach(seed: int, rank: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(11, 6, generator=g, dtype=torch.float64))
    x = torch.randn(6, 9, generator=g, dtype=torch.float64)
    rows = torch.randn(9, rank, generator=g, dtype=torch.float64)
    columns = torch.randn(11, rank, generator=g, dtype=torch.float64)
    columns[:, -1] = 0  # a direction that was grown a moment ago
    utility, vectors = absent_directions(q, x, rows, columns)
    out = torch.eye(11).double() - columns @ torch.linalg.pinv(columns)
    into = torch.eye(9).double() - rows @ torch.linalg.pinv(rows)
    dense = out @ q @ x @ into
    singular = torch.linalg.svdvals(dense)[:6]
    torch.testing.assert_close(utility, 0.5 * singular**2, rtol=1e-8, atol=1e-10)
    explained = (dense @ vectors.mT).norm(dim=0)
    torch.testing.assert_close(explained, singular, rtol=1e-6, atol=1e-8)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=5), st.integers(0, 4))
def test_the_next_utilities_go_on_falling(values: list[float], count: int) -> None:
    values = sorted(values, reverse=True)
    found = extrapolate(values, count)
    assert len(found) == count
    assert sorted(values + found, reverse=True) == values + found


@pytest.mark.parametrize("structure", ["diagonal", "dense", "lowrank"])
def test_the_taps_sketch_the_whitened_gradient(structure: str) -> None:
    """Two steps, two micro-batches each, against the dense gradient of every layer's weight."""
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
        opt.zero_grad()  # the oracle passed by the taps, too
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
            assert (strength < 1e-9) != fresh  # what A's rows reach already is absent only from a fresh layer
