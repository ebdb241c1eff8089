"""Best low-rank factors of tall matrices by way of their Gram matrix, shared by SVD and TT-SVD imports."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
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

    The columns of ``left`` are orthonormal, those beyond min(m, n) zero: a later approximation of ``right``
    then costs the product no more than it costs ``right``, which the error bound of TT-SVD rests on.
    """
    wide = matrix.double()
    if wide.shape[0] <= wide.shape[1]:
        left = leading_eigenvectors(wide @ wide.T, rank)
        return left, left.T @ wide
    basis = leading_eigenvectors(wide.T @ wide, min(rank, wide.shape[1]))
    left, triangle = torch.linalg.qr(wide @ basis)
    right = triangle @ basis.T
    spare = rank - left.shape[1]
    return F.pad(left, (0, spare)), F.pad(right, (0, 0, 0, spare))
