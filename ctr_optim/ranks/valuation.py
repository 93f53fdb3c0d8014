"""What a direction is worth, in nats per token: the marginal utility of rank.

A direction that the adapter has is worth what the loss would rise without it, ``sigma^2 / 2`` with sigma its singular
value in the Fisher metric; these come from r x r factors alone. A direction that it lacks is worth what the best step
along it would gain, ``sigma^2 / 2`` with sigma a singular value of the whitened gradient ``G~ = S^-1/2 G C^-1/2``;
these come from a sketch. Utilities of one layer fall from one direction to the next, so that filling a budget greedily
is optimal.

Layers of one shape are worked on at once. What is as wide as a layer enters through Gram matrices alone, and these and
all that is r x r is decomposed on the host (:func:`host`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Existing:
    """A layer's directions, most useful first: utility ``(r,)``, and the maps that keep the best of them.

    ``B A ~ (B restore[:, :e]) (keep[:e] A)`` is the best approximation of rank e. Several layers: batch dimensions.
    """

    utility: Tensor
    keep: Tensor
    restore: Tensor


def host(matrices: Tensor) -> Tensor:
    """Small matrices in float64 on the host; waits for the device.

    LAPACK decomposes a 16 x 16 matrix in some 40 microseconds, a layer's six in less than a single call to a device's
    solver takes, and what follows from them needs no further transfer.
    """
    return matrices.double().cpu()


def existing_directions(H: Tensor, D: Tensor) -> Existing:
    """Fisher-weighted singular directions of B A from ``H = A C A^T`` and ``D = B^T S B``, each ``(..., r, r)``.

    With ``H^1/2 D H^1/2 = U L U^T``, ``S^1/2 B A C^1/2`` has the singular values ``L^1/2``, and
    ``B (H^1/2 U_e) (U_e^T H^-1/2) A`` is its best approximation of rank e (Eckart & Young in the Fisher metric).
    All in float64, whatever comes in: H may be near singular, and what is dropped must be what is worth nothing.
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
    """Utilities ``(..., k)``, largest first, and right singular vectors ``(..., d_in, k)`` of what is out of reach.

    A step of B moves the layer along A's rows, a step of A along B's columns; both are taken out of the whitened
    gradient, which the sketch determines as ``G~ ~ Y (Psi^T Y)^+ Z`` (Tropp et al., 2017).

    Gram matrices square what they are made of, but in float64: singular values down to 1e-8 of the largest survive,
    and the float32 sums that come in are no finer than 1e-7. What lies below 1e-6 is given up for noise.

    Args:
        range_, corange: ``Y = G~ Omega (..., d_out, k)`` and ``Z = Psi^T G~ (..., l, d_in)``.
        psi: ``(d_out, l)``.
        rows: what spans A in whitened coordinates, ``(..., d_in, r)``.
        columns: what spans B in whitened coordinates, ``(..., d_out, r)``.

    Returns:
        utilities in float64 on the host, and the vectors, zero where the sketch knows of no further direction.
    """
    k = range_.shape[-1]
    left, right = torch.cat([range_, columns], -1).double(), torch.cat([corange.mT, rows], -1).double()
    core = host(psi.mT.double() @ left[..., :k])
    left_gram, _ = _outside(host(left.mT @ left), k)
    right_gram, spanned = _outside(host(right.mT @ right), corange.shape[-2])
    inverse = torch.linalg.pinv(core.mT @ core, rtol=1e-13, hermitian=True) @ core.mT
    # R with R^T R the left Gram matrix: R (Psi^T Y)^+ Z has the singular values and right vectors wanted
    values, vectors = torch.linalg.eigh(left_gram)
    half = values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT @ inverse
    energy, u = torch.linalg.eigh(half @ right_gram @ half.mT)
    energy, u = energy.flip(-1).clamp_min(0), u.flip(-1)
    known = energy > 1e-12 * energy[..., :1]
    mix = half.mT @ u * torch.where(known, energy, torch.inf).rsqrt().unsqueeze(-2)
    mix *= mix.gather(-2, mix.abs().argmax(-2, keepdim=True)).sign()  # rounding must not choose the sign
    mix = torch.cat([mix, -spanned @ mix], -2)
    return 0.5 * energy, (right @ mix.to(right.device, non_blocking=True)).to(range_.dtype)


def _outside(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What of the first ``count`` columns is out of the others' reach, from the Gram matrix of all.

    Returns:
        its Gram matrix ``(..., count, count)``, and the others' part in the first, ``(..., others, count)``.
    """
    cross = gram[..., count:, :count]
    spanned = torch.linalg.pinv(gram[..., count:, count:], rtol=1e-12, hermitian=True) @ cross
    outside = gram[..., :count, :count] - cross.mT @ spanned
    return 0.5 * (outside + outside.mT), spanned


# -- from utilities to the order in which directions are chosen -------------------------------------------------------

Candidates = list[tuple[float, bool]]  # utility, and whether the direction exists; the most useful first


def extrapolate(utility: Sequence[float], count: int) -> list[float]:
    """Return the next ``count`` utilities of a layer: they continue the geometric fall of its spectrum.

    The mean ratio of neighbours is used; 1/2 for a layer of rank 1.
    """
    if not utility:
        return [0.0] * count
    first, last = utility[0], utility[-1]
    fall = 0.5 if len(utility) == 1 or first <= 0 else (last / first) ** (1 / (len(utility) - 1))
    return [last * fall**k for k in range(1, count + 1)]


def exchange_rate(utilities: Iterable[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Return the median over layers of the next direction's utility by the spectrum over its utility by the sketch.

    Args:
        utilities: of existing and of absent directions, for each layer.
    """
    layers = list(utilities)
    if all(existing for existing, _ in layers):
        return 1.0  # only a layer without a spectrum needs the rate
    rates = [
        extrapolate(existing, 1)[0] / absent[0] for existing, absent in layers if existing and absent and absent[0] > 0
    ]
    return statistics.median(rates) if rates else 1.0


def ordered(existing: Sequence[float], absent: Sequence[float], favour: float, exchange: float | None) -> Candidates:
    """Return the candidates of one layer, largest utility first.

    Args:
        existing: utilities of the directions that the layer has.
        absent: utilities by the sketch of the directions that it lacks.
        favour: factor on existing directions, at least 1: hysteresis.
        exchange: value absent directions by the layer's spectrum, or by this factor times the sketch where a layer has
            no spectrum; None: by the sketch alone.
    """
    if exchange is not None:
        absent = extrapolate(existing, len(absent)) if existing else [exchange * u for u in absent]
    have = [(favour * u, True) for u in existing]
    lack = [(u, False) for u in absent]
    return sorted(have + lack, key=lambda c: (-c[0], not c[1]))


def in_nats(existing: Sequence[float], absent: Sequence[float], coupling: float) -> Candidates:
    """Return the candidates of one layer in nats per token: existing directions, then the spectrum's continuation.

    Args:
        coupling: of the whole adapter, from the block-diagonal form to nats.
    """
    known = [coupling * u for u in existing]
    return [(u, True) for u in known] + [(u, False) for u in extrapolate(known, len(absent))]


def own_utility(candidate: float, exists: bool, favour: float) -> float:
    """Return a candidate's utility without the factor that favours existing directions."""
    return candidate / favour if exists else candidate
