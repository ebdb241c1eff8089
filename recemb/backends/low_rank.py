"""Best low-rank factors of tall matrices by way of their Gram matrix, shared by SVD and TT-SVD imports."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def gram(blocks: Iterable[Tensor]) -> Tensor:
    """A^T A in float64 for A given as row blocks [*, n]; one block at a time is widened."""
    total: Tensor | None = None
    for block in blocks:
        wide = block.double()
        product = wide.T @ wide
        total = product if total is None else total.add_(product)
    if total is None:
        raise ValueError("gram of no blocks")
    return total


def leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """[n, rank] orthonormal eigenvectors of the largest eigenvalues, zero columns where rank > n.

    With A^T A this is the V of A's truncated SVD: A V V^T is the best rank-``rank`` approximation of A.
    """
    size = symmetric.shape[0]
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    kept = vectors[:, -min(rank, size) :].flip(1)
    if rank <= size:
        return kept.contiguous()
    return torch.cat([kept, kept.new_zeros(size, rank - size)], dim=1)


def truncated_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left [m, rank], right [rank, n]) with left @ right the best rank-``rank`` approximation, float64.

    ``left`` or ``right`` is orthonormal, whichever belongs to the shorter side; columns beyond min(m, n)
    are zero.
    """
    wide = matrix.double()
    if wide.shape[0] <= wide.shape[1]:
        left = leading_eigenvectors(wide @ wide.T, rank)
        return left, left.T @ wide
    right = leading_eigenvectors(wide.T @ wide, rank).T
    return wide @ right.T, right
