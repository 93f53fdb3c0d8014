"""Eigenbases of small symmetric matrices, batched over layers.

GPU libraries decompose many matrices in one launch only up to a width of 32, and wider matrices one after the other.
At rank 64, the two matrices of each of 224 layers would take as long as a training step. Therefore wider matrices use a
block Jacobi method with blocks that fit (Golub & Van Loan, Matrix Computations, 8.5). It starts from the previous
basis, which is nearly right, and then needs about two sweeps of a few launches each.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ctr_optim.linalg.shapes import sized

_AT_ONCE = 32  # largest width at which GPU libraries decompose many matrices in one launch
_MOST_SWEEPS = 10


def eigenbasis(matrix: Tensor, previous: Tensor) -> Tensor:
    """Return the orthonormal eigenvectors of symmetric matrices, in columns.

    A unit vector whose row in the matrix is exactly zero is returned exactly. These unit vectors come last, in the
    order of their rows. Therefore directions that a masked layer does not use never mix with the used directions.

    Args:
        matrix: ``(..., r, r)``.
        previous: the previous bases ``(..., r, r)``, a start for the iteration. A layer whose matrix or eigenvectors
            are not finite keeps its previous basis.

    Returns:
        ``(..., r, r)``. If the decomposition fails, the object ``previous`` itself.
    """
    finite = torch.isfinite(matrix).all(-1).all(-1)[..., None, None]
    size = matrix.shape[-1]
    columns = torch.arange(size, device=matrix.device)
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where(finite, matrix, eye)
    silent = (matrix == 0).all(-1)  # (..., r): rows of exact zeros
    # Eigenvalues that exceed all others and rise with the row put the directions of zero rows last.
    above = matrix.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) * (2 + columns.to(matrix.dtype) / size)
    try:
        vectors = _eigenvectors(matrix + torch.diag_embed(above * silent), previous)
    except LinAlgError:
        return previous
    heard = size - silent.sum(-1, keepdim=True)
    place = heard + silent.cumsum(-1) - 1  # the column for each zero row
    alone = (place[..., None] == columns) & silent[..., None]
    among = ~silent[..., None] & (columns < heard)[..., None, :]
    vectors = torch.where(alone, 1.0, torch.where(among, vectors, 0.0))
    return torch.where(finite & torch.isfinite(vectors).all(-1).all(-1)[..., None, None], vectors, previous)


def padded_basis(basis: Tensor, room: int) -> Tensor:
    """Return bases ``(..., r, r)`` enlarged to ``(..., room, room)`` by unit vectors."""
    new = sized(basis, (-2, -1), room).clone()
    new.diagonal(dim1=-2, dim2=-1)[..., basis.shape[-1] :] = 1
    return new


def _eigenvectors(matrix: Tensor, near: Tensor) -> Tensor:
    """Return eigenvectors in columns, by ascending eigenvalue; ``near`` is an approximate basis to start from."""
    if _one_by_one(matrix) and matrix.dim() == 3 and matrix.shape[-1] % _AT_ONCE == 0:
        found = block_jacobi(matrix, near)
        if found is not None:
            return found
    vectors: Tensor = torch.linalg.eigh(matrix)[1]
    return vectors


def _one_by_one(matrix: Tensor) -> bool:
    """Whether the GPU library would decompose the matrices one after the other, with separate launches."""
    return matrix.is_cuda and matrix.shape[-1] > _AT_ONCE


def block_jacobi(matrix: Tensor, start: Tensor, most_sweeps: int = _MOST_SWEEPS) -> Tensor | None:
    """Return the eigenvectors of symmetric matrices in columns, by ascending eigenvalue; as exact as ``eigh``.

    A sweep pairs every two blocks of 16 coordinates once, and rotates each pair into the eigenvectors of its 32 x 32
    submatrix. The iteration ends when the off-diagonal part is as small as rounding. Each sweep waits for the device
    once.

    Args:
        matrix: ``(L, r, r)`` with r a multiple of 32.
        start: orthonormal bases ``(L, r, r)``; the closer to the eigenvectors, the fewer sweeps.
        most_sweeps: largest number of sweeps.

    Returns:
        ``(L, r, r)``; None if the iteration does not converge within ``most_sweeps``.
    """
    size, width = matrix.shape[-1], _AT_ONCE
    *orders, back = (order.to(matrix.device) for order in _tournament(2 * size // width, width // 2))
    enough = 100 * torch.finfo(matrix.dtype).eps

    def turned(x: Tensor, turns: Tensor) -> Tensor:
        """Return the rows ``(L, r, *)``, each pair of blocks rotated by its own matrix of ``(L, r / 32, 32, 32)``."""
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
    # The rounding of thousands of rotations adds up. One Newton-Schulz step restores orthonormal rows.
    rows = 1.5 * rows - 0.5 * (rows @ rows.mT) @ rows
    rising = (rows @ matrix * rows).sum(-1).argsort(-1)
    return rows.gather(1, rising.unsqueeze(-1).expand_as(rows)).mT


@lru_cache(maxsize=8)
def _tournament(blocks: int, width: int) -> list[Tensor]:
    """Return orders of coordinates that place every two blocks side by side once, the lower block first.

    They form a round-robin tournament. Each order is relative to the previous one, and the last restores the original
    order.

    Args:
        blocks: number of blocks, even.
        width: coordinates per block.
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
