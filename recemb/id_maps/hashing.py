"""Universal hashing over the Mersenne prime 2**61 - 1, the same numbers on every device and platform.

Carter and Wegman's linear family h(v) = (sum_k a_k v_k + d) mod P maps distinct keys to the same value with
probability 1/P, and stays uniform after ``mod |M|`` for any array that fits in memory. Two flaws of the
public ROBE code are mended here. With P = 2**31 - 1, ids P apart collide always, and arrays above a billion
weights fill unevenly. And a linear hash maps consecutive ids, which are the hot ones when ids are in order of
frequency, to an arithmetic progression: for one seed in nine it left up to three quarters of a small array
unused. A quadratic term in the row makes the family 3-independent in it and the progression disappears.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

MERSENNE_61 = 2**61 - 1


def stable_integer(text: str) -> int:
    """A 61-bit integer of ``text`` that does not depend on process, platform or PYTHONHASHSEED."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % MERSENNE_61


@dataclass(frozen=True)
class UniversalHash:
    """h(e, x, b) = (A e + B x + Q x**2 + C b + D) mod P for a table e, a row x and a block b.

    Args:
        a, b, c, d, q: coefficients in [0, P); all but d are not 0.
    """

    a: int
    b: int
    c: int
    d: int
    q: int

    @classmethod
    def from_seed(cls, seed: int, purpose: str) -> UniversalHash:
        """Coefficients derived by SHA-256 from a seed and what the hash is for."""
        a, b, c, q = (stable_integer(f"recemb/{purpose}/{seed}/{k}") % (MERSENNE_61 - 1) + 1 for k in "ABCQ")
        return cls(a, b, c, stable_integer(f"recemb/{purpose}/{seed}/D"), q)

    def offsets(self, table: int, num_blocks: int) -> list[int]:
        """(A e + C b + D) mod P of every block b: what does not depend on the row."""
        base = self.a * table + self.d
        return [(base + self.c * block) % MERSENNE_61 for block in range(num_blocks)]

    def blocks(self, table: int, ids: Tensor, num_blocks: int) -> Tensor:
        """Hash every block of every row.

        Args:
            table: e in [0, P).
            ids: x, [L] int64 in [0, P).
            num_blocks: blocks b = 0 .. num_blocks - 1.

        Returns:
            [L, num_blocks] int64 in [0, P).
        """
        offset = torch.tensor(self.offsets(table, num_blocks), dtype=torch.int64, device=ids.device)
        rows = _multiply(_wrap(_multiply(ids, self.q) + self.b), ids)
        return _wrap(rows[:, None] + offset)


def _multiply(x: Tensor, a: int | Tensor) -> Tensor:
    """(a * x) mod P for int64 values in [0, P), in 31-bit limbs that never overflow."""
    low = 2**31 - 1
    a1, a0 = a >> 31, a & low
    x1, x0 = x >> 31, x & low
    # a x = a1 x1 2**62 + (a1 x0 + a0 x1) 2**31 + a0 x0, with 2**61 = 1 and 2**62 = 2 (mod P).
    middle = a1 * x0 + a0 * x1
    middle = (middle >> 30) + ((middle & (2**30 - 1)) << 31)
    bottom = a0 * x0
    bottom = (bottom & MERSENNE_61) + (bottom >> 61)
    return _wrap(2 * (a1 * x1) + middle + bottom)


def _wrap(x: Tensor) -> Tensor:
    """x mod P for 0 <= x < 2**63."""
    folded = (x & MERSENNE_61) + (x >> 61)
    return torch.where(folded >= MERSENNE_61, folded - MERSENNE_61, folded)
