"""Positional number systems: mixed radix (tensor trains) and its two-digit case (quotient-remainder)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def mixed_radix(ids: Tensor, radices: Sequence[int]) -> Tensor:
    """Digits of ``ids`` in a mixed-radix system, most significant first.

    id = ((i_1 * p_2 + i_2) * p_3 + i_3) ..., 0 <= i_k < p_k. Exact in int64: floating-point division goes
    wrong above 2**24 ids.

    Args:
        ids: [L] int64 in [0, prod(radices)).
        radices: p_1 .. p_d.

    Returns:
        [L, d] int64.
    """
    digits = torch.empty(ids.numel(), len(radices), dtype=torch.int64, device=ids.device)
    rest = ids
    for k in range(len(radices) - 1, 0, -1):
        digits[:, k] = rest % radices[k]
        rest = rest // radices[k]
    digits[:, 0] = rest
    return digits


def quotient_remainder(ids: Tensor, divisor: int) -> Tensor:
    """[L, 2] int64: (id // divisor, id mod divisor), complementary partitions (Shi et al., 2020)."""
    return torch.stack((ids // divisor, ids % divisor), dim=1)


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer >= numerator / denominator, without floats."""
    return -(-numerator // denominator)


def factorizations(number: int, parts: int) -> list[tuple[int, ...]]:
    """Every ordered way to write ``number`` as a product of ``parts`` factors >= 1."""
    if parts == 1:
        return [(number,)]
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    return [(d, *rest) for d in divisors for rest in factorizations(number // d, parts - 1)]
