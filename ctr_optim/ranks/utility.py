"""What a direction is worth, in nats per token: the marginal utility of rank.

A direction that the adapter has is worth what the loss would rise without it, ``sigma^2 / 2`` with sigma its singular
value in the Fisher metric; these come from r x r factors alone. A direction that it lacks is worth what the best step
along it would gain, ``sigma^2 / 2`` with sigma a singular value of the whitened gradient ``G~ = S^-1/2 G C^-1/2``;
these come from a sketch. Utilities of one layer fall from one direction to the next, so that filling a budget greedily
is optimal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Existing:
    """A layer's directions, most useful first: utility ``(r,)``, and the maps that keep the best of them.

    ``B A ~ (B restore[:, :e]) (keep[:e] A)`` is the best approximation of rank e.
    """

    utility: Tensor
    keep: Tensor
    restore: Tensor


def existing_directions(H: Tensor, D: Tensor) -> Existing:
    """Fisher-weighted singular directions of B A from ``H = A C A^T`` and ``D = B^T S B``, each ``(r, r)``.

    With ``H^1/2 D H^1/2 = U L U^T``, ``S^1/2 B A C^1/2`` has the singular values ``L^1/2``, and
    ``B (H^1/2 U_e) (U_e^T H^-1/2) A`` is its best approximation of rank e (Eckart & Young in the Fisher metric).
    All in float64, whatever comes in: H may be near singular, and what is dropped must be what is worth nothing.
    """
    H, D = H.double(), D.double()
    if not H.numel():
        return Existing(H.new_zeros(0), H, D)
    values, vectors = torch.linalg.eigh(0.5 * (H + H.mT))
    floor = 1e-10 * values.amax().clamp_min(torch.finfo(H.dtype).tiny)
    roots = values.clamp_min(floor).sqrt()
    half = (vectors * roots) @ vectors.mT
    inverse_half = (vectors / roots) @ vectors.mT
    energy, u = torch.linalg.eigh(half @ (0.5 * (D + D.mT)) @ half)
    energy, u = energy.flip(-1).clamp_min(0), u.flip(-1)
    return Existing(0.5 * energy, u.mT @ inverse_half, half @ u)


def reconstruct(range_: Tensor, corange: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``Q (d_out, k)``, ``X (k, d_in)`` of G from ``Y = G Omega``, ``Z = Psi^T G`` (Tropp et al., 2017)."""
    q, _ = torch.linalg.qr(range_)
    return q, torch.linalg.pinv(psi.mT @ q) @ corange


def absent_directions(q: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Utilities ``(k,)``, largest first, and right singular vectors ``(k, d_in)`` of what the adapter cannot reach.

    A step of B moves the layer along A's rows, a step of A along B's columns; both are taken out of ``G~ = Q X``.

    Args:
        q, x: the factors of the whitened gradient, ``(d_out, k)`` and ``(k, d_in)``.
        rows: what spans A in whitened coordinates, ``(d_in, r)``.
        columns: what spans B in whitened coordinates, ``(d_out, r)``.
    """
    left, right = _orthonormal(columns), _orthonormal(rows)
    q = q - left @ (left.mT @ q)
    x = x - (x @ right) @ right.mT
    _, triangle = torch.linalg.qr(q)
    _, singular, vectors = torch.linalg.svd(triangle @ x, full_matrices=False)
    return 0.5 * singular.square(), vectors


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span, zero columns where the rank is short."""
    svd: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(columns, full_matrices=False)
    u, singular, _ = svd  # descending
    return u * (singular > 1e-6 * singular[:1].clamp_min(torch.finfo(u.dtype).tiny))
