"""The whitener of retained text, compared with dense linear algebra in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ctr_optim.retention import Metric, metric_of

settings = {"power": st.sampled_from([0.0, 0.25, 0.5, 1.0]), "damping": st.sampled_from([1e-3, 0.03, 0.3])}


def second_moment(seed: int, width: int, spread: float) -> Tensor:
    """Return a symmetric positive definite matrix ``(d, d)`` whose eigenvalues span ``spread`` decades."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return (q * torch.logspace(0, spread, width, dtype=torch.float64)) @ q.mT


def eigenpairs(C: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(C)
    rest = values[:-rank].mean() if rank < len(C) else C.new_zeros(())
    return values[-rank:], vectors[:, -rank:], rest


def dense(C: Tensor, power: float, damping: float) -> Tensor:
    """Return P, computed from its definition."""
    values, vectors = torch.linalg.eigh(C)
    P = (vectors * (values + damping * values.mean()) ** -power) @ vectors.mT
    return P * (C.trace() / (P @ C @ P).trace()).sqrt()


@given(st.integers(0, 99), st.integers(1, 9), st.sampled_from([0.0, 2.0, 5.0]), st.data())
def test_symmetric_positive_definite_and_of_the_same_trace(seed: int, rank: int, spread: float, data) -> None:
    C = second_moment(seed, 9, spread)
    P = metric_of(*eigenpairs(C, rank), data.draw(settings["power"]), data.draw(settings["damping"])).to_dense()
    torch.testing.assert_close(P, P.mT, rtol=0, atol=1e-9)
    assert torch.linalg.eigvalsh(P).amin() > 0
    torch.testing.assert_close((P @ C @ P).trace(), C.trace())  # holds for the full C, not only for its low-rank form


@given(st.integers(0, 99), st.sampled_from([0.0, 2.0, 5.0]), st.data())
def test_exact_where_every_eigenpair_is_kept(seed: int, spread: float, data) -> None:
    C, power, damping = second_moment(seed, 7, spread), data.draw(settings["power"]), data.draw(settings["damping"])
    torch.testing.assert_close(metric_of(*eigenpairs(C, 7), power, damping).to_dense(), dense(C, power, damping))


@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from([0.0, 2.0, 5.0]), st.data())
def test_the_dense_formula_of_the_flattened_tail(seed: int, rank: int, spread: float, data) -> None:
    power, damping = data.draw(settings["power"]), data.draw(settings["damping"])
    values, vectors, rest = eigenpairs(second_moment(seed, 7, spread), rank)
    beyond = torch.eye(7, dtype=torch.float64) - vectors @ vectors.mT
    flattened = (vectors * values) @ vectors.mT + rest * beyond
    torch.testing.assert_close(
        metric_of(values, vectors, rest, power, damping).to_dense(), dense(flattened, power, damping)
    )


def test_products_of_stacked_layers_are_each_layers_own() -> None:
    metrics = [metric_of(*eigenpairs(second_moment(seed, 8, 3.0), 3)) for seed in range(4)]
    stacked, x = Metric.stack(metrics), torch.randn(4, 5, 8, dtype=torch.float64)
    for index, one in enumerate(metrics):
        torch.testing.assert_close(stacked.apply(x)[index], x[index] @ one.to_dense())
    torch.testing.assert_close(stacked.solve(stacked.apply(x)), x)


def test_nothing_seen_changes_nothing() -> None:
    zero = metric_of(torch.zeros(2), torch.eye(5, 2), torch.zeros(()))
    torch.testing.assert_close(zero.to_dense(), torch.eye(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_keeps_its_dtype(dtype: torch.dtype) -> None:
    P = metric_of(*eigenpairs(second_moment(0, 8, 3.0), 3))
    assert P.apply(torch.ones(2, 8, dtype=dtype)).dtype == dtype
