"""Utilities of directions, in nats per token: the marginal value of rank.

The utility of an existing direction is the increase of the loss without it, ``sigma^2 / 2`` with sigma its singular
value in the Fisher metric. It follows from r x r factors. The utility of an absent direction is the decrease of the
loss by the best step along it. This is ``sigma^2 / 2`` with sigma a singular value of the whitened gradient
``G~ = S^-1/2 G C^-1/2``, and follows from a sketch of G~. A layer's utilities are in decreasing order, so greedy
allocation of a budget is optimal for layers of equal cost.

Batched calls process all layers of one shape. Wide matrices enter through their Gram matrices; all small matrices are
decomposed on the CPU (:func:`host`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Existing:
    """A layer's directions, largest utility first. Several layers add leading batch dimensions.

    ``B A ~ (B restore[:, :e]) (keep[:e] A)`` is the best approximation of rank e.

    Attributes:
        utility: ``(r,)`` utilities.
        keep: ``(r, r)`` map of the rows of A.
        restore: ``(r, r)`` map of the columns of B, the inverse of ``keep``.
    """

    utility: Tensor
    keep: Tensor
    restore: Tensor


def host(matrices: Tensor) -> Tensor:
    """Return small matrices in float64 on the CPU; waits for the device.

    LAPACK on the CPU decomposes a 16 x 16 matrix in about 40 microseconds. A layer's six decompositions take less time
    than one call of a GPU solver.
    """
    return matrices.double().cpu()


def existing_directions(H: Tensor, D: Tensor) -> Existing:
    """Return the Fisher-weighted singular directions of B A.

    With ``H^1/2 D H^1/2 = U L U^T``, the matrix ``S^1/2 B A C^1/2`` has the singular values ``L^1/2``. The best
    approximation of ``B A`` of rank e in the Fisher metric is ``B (H^1/2 U_e) (U_e^T H^-1/2) A`` (Eckart and Young).
    The computation is in float64 for any input, because H may be nearly singular.

    Args:
        H: ``A C A^T (..., r, r)``.
        D: ``B^T S B (..., r, r)``.
    """
    H, D = host(H), host(D)
    if not H.numel():
        return Existing(H.new_zeros(H.shape[:-1]), H, D)
    values, vectors = torch.linalg.eigh(0.5 * (H + H.mT))
    floor = 1e-10 * values.amax(-1, keepdim=True).clamp_min(torch.finfo(H.dtype).tiny)
    roots = values.clamp_min(floor).sqrt().unsqueeze(-2)
    half = (vectors * roots) @ vectors.mT
    inverse_half = (vectors / roots) @ vectors.mT
    energy, u = torch.linalg.eigh(half @ (0.5 * (D + D.mT)) @ half)
    energy, u = energy.flip(-1).clamp_min(0), u.flip(-1)
    return Existing(0.5 * energy, u.mT @ inverse_half, half @ u)


def absent_directions(
    range_: Tensor, corange: Tensor, psi: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Return utilities and right singular vectors of the whitened gradient outside the spans of A and B.

    A step of B changes the layer along A's rows, and a step of A along B's columns. Both spans are projected out of the
    whitened gradient, which the sketch gives as ``G~ ~ Y (Psi^T Y)^+ Z`` (Tropp et al., 2017).

    A Gram matrix squares the singular values. In float64, singular values down to 1e-8 of the largest survive this; the
    float32 sums of the sketch have a precision of about 1e-7. Singular values below 1e-6 of the largest count as noise.

    Args:
        range_, corange: ``Y = G~ Omega (..., d_out, k)`` and ``Z = Psi^T G~ (..., l, d_in)``.
        psi: test matrix Psi ``(d_out, l)``.
        rows: columns that span A's rows in whitened coordinates, ``(..., d_in, r)``.
        columns: columns that span B's columns in whitened coordinates, ``(..., d_out, r)``.

    Returns:
        Utilities ``(..., k)`` in float64 on the CPU, largest first, and vectors ``(..., d_in, k)``. Vectors are zero
        where the sketch holds no further direction.
    """
    k = range_.shape[-1]
    left, right = torch.cat([range_, columns], -1).double(), torch.cat([corange.mT, rows], -1).double()
    core = host(psi.mT.double() @ left[..., :k])
    left_gram, _ = _outside(host(left.mT @ left), k)
    right_gram, spanned = _outside(host(right.mT @ right), corange.shape[-2])
    inverse = torch.linalg.pinv(core.mT @ core, rtol=1e-13, hermitian=True) @ core.mT
    # For R with R^T R equal to the left Gram matrix, R (Psi^T Y)^+ Z has the same singular values and right vectors.
    values, vectors = torch.linalg.eigh(left_gram)
    half = values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT @ inverse
    energy, u = torch.linalg.eigh(half @ right_gram @ half.mT)
    energy, u = energy.flip(-1).clamp_min(0), u.flip(-1)
    known = energy > 1e-12 * energy[..., :1]
    mix = half.mT @ u * torch.where(known, energy, torch.inf).rsqrt().unsqueeze(-2)
    mix *= mix.gather(-2, mix.abs().argmax(-2, keepdim=True)).sign()  # fix the sign, which rounding would choose
    mix = torch.cat([mix, -spanned @ mix], -2)
    return 0.5 * energy, (right @ mix.to(right.device, non_blocking=True)).to(range_.dtype)


def _outside(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Project the first ``count`` columns off the span of the other columns, given the Gram matrix of all.

    Returns:
        The Gram matrix of the projected columns ``(..., count, count)``, and the coefficients of the removed part in
        the other columns ``(..., others, count)``.
    """
    cross = gram[..., count:, :count]
    spanned = torch.linalg.pinv(gram[..., count:, count:], rtol=1e-12, hermitian=True) @ cross
    outside = gram[..., :count, :count] - cross.mT @ spanned
    return 0.5 * (outside + outside.mT), spanned


# -- from utilities to the order in which directions are chosen -------------------------------------------------------

Candidates = list[tuple[float, bool]]  # utility and whether the direction exists, largest utility first


def extrapolate(utility: Sequence[float], count: int) -> list[float]:
    """Return the next ``count`` utilities of a layer by geometric extrapolation.

    The ratio is the geometric mean of the ratios of neighbouring utilities; 1/2 for a layer of rank 1.
    """
    if not utility:
        return [0.0] * count
    first, last = utility[0], utility[-1]
    fall = 0.5 if len(utility) == 1 or first <= 0 else (last / first) ** (1 / (len(utility) - 1))
    return [last * fall**k for k in range(1, count + 1)]


def exchange_rate(utilities: Iterable[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Return the factor that converts utilities of the sketch to the scale of extrapolated utilities.

    It is the median over layers of the ratio of both estimates for the next direction; 1 if no layer needs it.

    Args:
        utilities: for each layer, utilities of existing directions, and of absent directions by the sketch.
    """
    layers = list(utilities)
    if all(existing for existing, _ in layers):
        return 1.0  # only layers of rank 0 need the rate
    rates = [
        extrapolate(existing, 1)[0] / absent[0] for existing, absent in layers if existing and absent and absent[0] > 0
    ]
    return statistics.median(rates) if rates else 1.0


def ordered(existing: Sequence[float], absent: Sequence[float], favour: float, exchange: float | None) -> Candidates:
    """Return the candidates of one layer, largest utility first.

    Args:
        existing: utilities of the layer's directions.
        absent: utilities of absent directions by the sketch.
        favour: factor on existing directions, at least 1 (hysteresis).
        exchange: None to use ``absent`` as given. Otherwise absent directions get extrapolated utilities; in a layer
            of rank 0, they get this factor times ``absent``.
    """
    if exchange is not None:
        absent = extrapolate(existing, len(absent)) if existing else [exchange * u for u in absent]
    have = [(favour * u, True) for u in existing]
    lack = [(u, False) for u in absent]
    return sorted(have + lack, key=lambda c: (-c[0], not c[1]))


def in_nats(existing: Sequence[float], absent: Sequence[float], coupling: float) -> Candidates:
    """Return the candidates of one layer in nats per token: existing directions, then extrapolated ones.

    Args:
        existing: utilities of the layer's directions, in the block-diagonal metric.
        absent: utilities of absent directions; only their number is used.
        coupling: coupling of the whole adapter, which converts utilities to nats.
    """
    known = [coupling * u for u in existing]
    return [(u, True) for u in known] + [(u, False) for u in extrapolate(known, len(absent))]


def own_utility(candidate: float, exists: bool, favour: float) -> float:
    """Return a candidate's utility without the hysteresis factor on existing directions."""
    return candidate / favour if exists else candidate
