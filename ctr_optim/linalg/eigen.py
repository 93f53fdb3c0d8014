"""Eigenbases of the small factors, of many layers at once.

Libraries decompose many matrices in one launch up to a width of 32 and one after the other above: at rank 64, two
matrices for each of 224 layers would take as long as a whole training step. What is wider is taken apart into pairs of
blocks that fit (block Jacobi: Golub & Van Loan, Matrix Computations, 8.5), beginning with the last basis, which is
nearly right: two sweeps of a few launches each.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ctr_optim.linalg.shapes import sized

_AT_ONCE = 32  # the widest matrices of which a GPU's library decomposes many in one launch
_MOST_SWEEPS = 10


def eigenbasis(matrix: Tensor, previous: Tensor) -> Tensor:
    """Orthonormal eigenvectors of symmetric ``(..., r, r)`` matrices, in columns.

    A direction of which the matrix knows nothing (a row of exact zeros) is an eigenvector, exactly. These come
    last, in the order of the rows: directions that a masked layer does not use never mix with those that it does.
    A layer whose matrix is not finite keeps its previous basis. Where the decomposition fails, ``previous`` itself is
    returned, the same object: every layer keeps what it has.
    """
    finite = torch.isfinite(matrix).all(-1).all(-1)[..., None, None]
    size = matrix.shape[-1]
    columns = torch.arange(size, device=matrix.device)
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where(finite, matrix, eye)
    silent = (matrix == 0).all(-1)  # (..., r)
    # eigenvalues above all others, rising with the row, put the silent directions last
    above = matrix.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) * (2 + columns.to(matrix.dtype) / size)
    try:
        vectors = _eigenvectors(matrix + torch.diag_embed(above * silent), previous)
    except LinAlgError:
        return previous
    heard = size - silent.sum(-1, keepdim=True)
    place = heard + silent.cumsum(-1) - 1  # the column of each silent row
    alone = (place[..., None] == columns) & silent[..., None]
    among = ~silent[..., None] & (columns < heard)[..., None, :]
    vectors = torch.where(alone, 1.0, torch.where(among, vectors, 0.0))
    return torch.where(finite & torch.isfinite(vectors).all(-1).all(-1)[..., None, None], vectors, previous)


def padded_basis(basis: Tensor, room: int) -> Tensor:
    """Return bases ``(..., r, r)`` enlarged to ``room``; the added directions are their own basis."""
    new = sized(basis, (-2, -1), room).clone()
    new.diagonal(dim1=-2, dim2=-1)[..., basis.shape[-1] :] = 1
    return new


def _eigenvectors(matrix: Tensor, near: Tensor) -> Tensor:
    """Eigenvectors in columns, their eigenvalues rising; ``near``: a basis that may be nearly right."""
    if _one_by_one(matrix) and matrix.dim() == 3 and matrix.shape[-1] % _AT_ONCE == 0:
        found = block_jacobi(matrix, near)
        if found is not None:
            return found
    vectors: Tensor = torch.linalg.eigh(matrix)[1]
    return vectors


def _one_by_one(matrix: Tensor) -> bool:
    """Whether the library would decompose one matrix after the other, each with launches of its own."""
    return matrix.is_cuda and matrix.shape[-1] > _AT_ONCE


def block_jacobi(matrix: Tensor, start: Tensor, most_sweeps: int = _MOST_SWEEPS) -> Tensor | None:
    """Eigenvectors of symmetric ``(L, r, r)`` matrices in columns, their eigenvalues rising; r a multiple of 32.

    A sweep brings every two blocks of 16 coordinates together once and turns them into the eigenvectors of what they
    make, the smaller eigenvalues first. It ends where what is left off the diagonal is rounding; every sweep waits for
    the device once. As exact as ``torch.linalg.eigh``.

    Args:
        start: orthonormal bases ``(L, r, r)``; the nearer to the eigenvectors, the fewer sweeps.

    Returns:
        None where ``most_sweeps`` did not do.
    """
    size, width = matrix.shape[-1], _AT_ONCE
    *orders, back = (order.to(matrix.device) for order in _tournament(2 * size // width, width // 2))
    enough = 100 * torch.finfo(matrix.dtype).eps

    def turned(x: Tensor, turns: Tensor) -> Tensor:
        """Rows ``(L, r, *)``, each pair of blocks turned by its own ``(L, r / 32, 32, 32)``."""
        return (turns @ x.reshape(*turns.shape[:-1], -1)).view(x.shape)

    rows = start.mT
    for _ in range(most_sweeps):
        inner = rows @ matrix @ rows.mT
        diagonal = torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
        off = torch.linalg.matrix_norm(inner - diagonal)
        if bool((off <= enough * torch.linalg.matrix_norm(inner)).all()):
            break
        for order in orders:
            rows, inner = rows[:, order], inner[:, order][:, :, order]
            pairs = inner.view(-1, size // width, width, size // width, width)
            turns = torch.linalg.eigh(pairs.diagonal(dim1=1, dim2=3).movedim(-1, 1))[1].mT
            rows, inner = turned(rows, turns), turned(turned(inner, turns).mT, turns)
        rows = rows[:, back]
    else:
        return None
    # thousands of turns add up: one step of Newton and Schulz makes the rows orthonormal to rounding
    rows = 1.5 * rows - 0.5 * (rows @ rows.mT) @ rows
    rising = (rows @ matrix * rows).sum(-1).argsort(-1)
    return rows.gather(1, rising.unsqueeze(-1).expand_as(rows)).mT


@lru_cache(maxsize=8)
def _tournament(blocks: int, width: int) -> list[Tensor]:
    """Orders of coordinates in which every two blocks lie side by side once, the lower first (a round-robin).

    Each is relative to the one before; the last leads back to the beginning.
    """
    orders, players, place = [], list(range(blocks)), list(range(blocks))
    for _ in range(blocks - 1):
        pairs = [sorted((players[i], players[-1 - i])) for i in range(blocks // 2)]
        order = [block for pair in pairs for block in pair]
        orders.append([place[block] for block in order])
        place = [order.index(block) for block in range(blocks)]
        players = [players[0], players[-1], *players[1:-1]]
    steps = torch.arange(width, device="cpu")
    return [(torch.tensor(order, device="cpu").unsqueeze(-1) * width + steps).flatten() for order in [*orders, place]]
