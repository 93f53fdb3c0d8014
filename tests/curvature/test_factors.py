"""Structured factors against dense float64 oracles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LoRALinear, net, relative_error, train, trainable

from ctr_optim import CTROptimizer
from ctr_optim.curvature.blocks import refresh_bases
from ctr_optim.curvature.factors import STRUCTURES, Dense, Diagonal, Factor, LowRank
from ctr_optim.linalg import eigen
from ctr_optim.linalg.eigen import block_jacobi, eigenbasis

WIDTH = 40


def rows(n: int, rank: int = WIDTH, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Return ``(n, WIDTH)`` vectors that span ``rank`` directions of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -2, rank, dtype=torch.float64)
    inner = torch.randn(n, rank, generator=generator, dtype=torch.float64) * spread
    return (inner @ torch.randn(rank, WIDTH, generator=generator, dtype=torch.float64)).to(dtype)


def empty(structure: type[Factor], *batch: int, dtype: torch.dtype = torch.float64) -> Factor:
    return structure(*(torch.zeros(*batch, *shape, dtype=dtype) for shape in structure.shapes(WIDTH)))


def filled(structure: type[Factor], v: torch.Tensor) -> Factor:
    return structure(*structure.sums(v, v.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dense_and_diagonal_sum_outer_products_of_rows(dtype: torch.dtype) -> None:
    v = rows(50).to(dtype)
    expected = v.double().mT @ v.double()
    tol = 1e-12 if dtype == torch.float64 else 1e-5
    for structure, target in ((Dense, expected), (Diagonal, expected.diagonal().diag())):
        (field,) = (
            a + b for a, b in zip(structure.sums(v[:20], v.dtype), structure.sums(v[20:], v.dtype), strict=True)
        )
        factor = structure(field)
        assert factor.to_dense().dtype == dtype
        assert relative_error(factor.to_dense(), target) < tol


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-5), (torch.float32, 2e-3)])
@pytest.mark.parametrize("rank", [1, 5, 31])
def test_low_rank_is_exact_where_the_rank_fits(rank: int, dtype: torch.dtype, tol: float) -> None:
    v = rows(200, rank, dtype)
    expected = v.double().mT @ v.double()
    assert relative_error(filled(LowRank, v).to_dense(), expected) < tol


def test_low_rank_keeps_the_diagonal_and_beats_it() -> None:
    v = rows(400)
    expected = v.mT @ v
    got = filled(LowRank, v).to_dense()
    torch.testing.assert_close(got.diagonal(), expected.diagonal(), rtol=1e-3, atol=0)
    assert relative_error(got, expected) < 0.2 * relative_error(expected.diagonal().diag(), expected)


@pytest.mark.parametrize("name", STRUCTURES)
def test_matmul_is_a_product_with_the_dense_matrix(name: str) -> None:
    factor, x = filled(STRUCTURES[name], rows(60)), torch.randn(WIDTH, 3, dtype=torch.float64)
    assert relative_error(factor.matmul(x), factor.to_dense() @ x) < 1e-10


@pytest.mark.parametrize("name", STRUCTURES)
@given(damping=st.floats(1e-3, 10.0), seed=st.integers(0, 50), n=st.integers(2, 100))
def test_whitener_turns_the_damped_matrix_into_the_identity(name: str, damping: float, seed: int, n: int) -> None:
    structure = STRUCTURES[name]
    factor = filled(structure, rows(n, seed=seed))
    dense = factor.to_dense()
    eye = torch.eye(WIDTH, dtype=dense.dtype)
    W = structure.whiten(factor.whitener(damping), eye)
    damped = dense + damping * dense.diagonal().mean() * eye
    torch.testing.assert_close(W @ damped @ W.mT, eye, rtol=0, atol=1e-5 if name == "lowrank" else 1e-8)


@pytest.mark.parametrize("name", STRUCTURES)
def test_batched_factors_equal_single_ones(name: str) -> None:
    structure = STRUCTURES[name]
    batch = structure(*structure.sums(torch.stack([rows(30, seed=i) for i in range(3)]), torch.float64))
    x = torch.randn(3, WIDTH, 2, dtype=torch.float64)
    singles = [filled(structure, rows(30, seed=i)) for i in range(3)]
    whitener = batch.whitener(0.1)
    for i, single in enumerate(singles):
        torch.testing.assert_close(batch.to_dense()[i], single.to_dense())
        torch.testing.assert_close(batch.matmul(x)[i], single.matmul(x[i]))
        alone = structure.whiten(single.whitener(0.1), x[i])
        torch.testing.assert_close(structure.whiten(whitener, x)[i], alone, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_that_saw_nothing_is_zero_and_finite(name: str, dtype: torch.dtype) -> None:
    factor, x = empty(STRUCTURES[name], 2, dtype=dtype), torch.randn(2, WIDTH, 3, dtype=dtype)
    assert torch.equal(factor.matmul(x), torch.zeros_like(x))
    assert torch.equal(factor.to_dense(), torch.zeros(2, WIDTH, WIDTH, dtype=dtype))
    assert torch.equal(type(factor).whiten(factor.whitener(0.1), x), torch.zeros_like(x))


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
@pytest.mark.parametrize("name", STRUCTURES)
def test_scale_of_the_rows_only_scales_the_matrix(name: str, scale: float) -> None:
    v = rows(60, rank=10, dtype=torch.float32)
    one, other = filled(STRUCTURES[name], v).to_dense(), filled(STRUCTURES[name], v * scale).to_dense()
    assert relative_error(other.double() / scale**2, one) < 1e-2


@given(seed=st.integers(0, 1000), rank=st.integers(1, 9))
def test_eigenbasis_is_orthonormal_and_diagonalises(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, rank, rank, generator=generator, dtype=torch.float64)
    matrix, eye = x @ x.mT, torch.eye(rank, dtype=torch.float64)
    Q = eigenbasis(matrix, eye.expand(4, rank, rank))
    torch.testing.assert_close(Q.mT @ Q, eye.expand(4, rank, rank), rtol=0, atol=1e-10)
    inner = Q.mT @ matrix @ Q
    off = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-9 * matrix.abs().max()


@given(seed=st.integers(0, 1000), size=st.sampled_from([32, 64, 96]), fall=st.floats(0, 1.5), known=st.integers(1, 96))
@settings(max_examples=15)
def test_block_jacobi_is_the_eigendecomposition(seed: int, size: int, fall: float, known: int) -> None:
    """The start is the identity or the previous basis; spectra include zero and equal eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, size + 1, dtype=torch.float64) ** -fall
    scales[known:] *= 0 if seed % 3 == 0 else 1
    turn = torch.linalg.qr(torch.randn(3, size, size, generator=generator, dtype=torch.float64))[0]
    matrix, eye = turn * scales @ turn.mT, torch.eye(size, dtype=torch.float64).expand(3, size, size)
    Q = block_jacobi(matrix, eye, most_sweeps=30)
    assert Q is not None
    torch.testing.assert_close(Q.mT @ Q, eye, rtol=0, atol=1e-12)
    inner = Q.mT @ matrix @ Q
    off = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() <= 1e-12 * size
    torch.testing.assert_close(
        inner.diagonal(dim1=-2, dim2=-1), torch.linalg.eigvalsh(matrix), rtol=0, atol=1e-12 * size
    )
    moved = matrix + 1e-3 * torch.randn(3, size, size, generator=generator, dtype=torch.float64)
    moved = 0.5 * (moved + moved.mT)
    again = block_jacobi(moved, Q * (1 + 1e-6), most_sweeps=30)  # the result corrects accumulated rounding
    assert again is not None
    torch.testing.assert_close(again.mT @ again, eye, rtol=0, atol=1e-11)
    inner = again.mT @ moved @ again
    torch.testing.assert_close(inner, torch.diag_embed(torch.linalg.eigvalsh(moved)), rtol=0, atol=1e-11 * size)


def test_wide_bases_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 40 is padded to 64; one direction is unused, and one layer's factor is not finite."""
    x = torch.randn(3, 200, 64, dtype=torch.float64) * torch.linspace(1, 0.2, 64).double()
    x[..., 7] = x[..., 40:] = 0
    matrix, last = x.mT @ x, eigen.padded_basis(torch.linalg.qr(torch.randn(3, 40, 40, dtype=torch.float64))[0], 64)
    matrix[2, 5, 5] = float("nan")
    expected = eigenbasis(matrix, last)
    monkeypatch.setattr(eigen, "_one_by_one", lambda _: True)
    got = eigenbasis(matrix, last)
    overlap = got[:2].mT @ expected[:2]
    torch.testing.assert_close(overlap.abs(), torch.eye(64).double().expand_as(overlap), rtol=0, atol=1e-8)
    assert torch.equal(got[:2, :, 39:], expected[:2, :, 39:])  # unused directions are exact
    assert torch.equal(got[2], last[2])


def test_block_jacobi_says_where_it_has_not_come_to_an_end() -> None:
    x = torch.randn(2, 64, 64, dtype=torch.float64)
    assert block_jacobi(x @ x.mT, torch.eye(64, dtype=torch.float64).expand(2, 64, 64), most_sweeps=1) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_eigenbasis_keeps_the_previous_one_where_a_matrix_is_not_finite(bad: float) -> None:
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    matrix = x @ x.mT
    previous = torch.linalg.qr(torch.randn(3, 4, 4, dtype=torch.float64))[0]
    clean = eigenbasis(matrix, previous)
    matrix[1, 2, 2] = bad
    got = eigenbasis(matrix, previous)
    assert torch.equal(got[1], previous[1])
    assert torch.equal(got[0], clean[0]) and torch.equal(got[2], clean[2])


def test_eigenbasis_keeps_the_previous_one_where_the_decomposition_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    previous = torch.linalg.qr(torch.randn(2, 3, 3))[0]
    assert torch.equal(eigenbasis(torch.eye(3).expand(2, 3, 3), previous), previous)


def test_bases_of_many_ranks_are_each_layers_own() -> None:
    """One padded, batched call gives each layer its own basis, despite unused directions and a non-finite factor."""
    model = net(rank=5)
    model.down = LoRALinear(10, 7, 2, 1.0).double()
    opt = CTROptimizer(trainable(model), lr=0.05, max_kl=1e-3, model=model, factor_interval=1)
    train(model, opt, 2)
    stacks = [pair for block in opt.blocks for pair in block.bases()]
    (up_a, up_d), (_, up_h), (down_a, down_d), _ = stacks
    up_d[:, 3] = up_d[:, :, 3] = 0
    down_d[0, 0, 0] = float("nan")
    up_h.copy_(up_h @ up_h)
    before = {stack: stack.tensors["basis"].clone() for stack, _ in stacks}
    assert refresh_bases(opt.blocks) == 0
    for stack, factor in stacks:
        basis, own = stack.tensors["basis"], eigenbasis(factor, before[stack])
        overlap = basis.mT @ own
        torch.testing.assert_close(overlap.abs(), torch.eye(basis.shape[-1]).double().expand_as(overlap))
    assert torch.equal(down_a.tensors["basis"], before[down_a])
    assert up_a.tensors["basis"][0, 3].tolist() == [0, 0, 0, 0, 1]
