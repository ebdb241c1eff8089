"""Writing single rows into a tensor train at the least cost to the other rows.

Core k of a row with digits (i_1 .. i_d) is sandwiched between what lies left and right of it,

    row = L G_k[i_k] R,    L [q_1 .. q_{k-1}, R_{k-1}],    R [R_k, q_{k+1} .. q_d],

so with the other cores held the rows are linear in the slices of core k. Changing slice j by X changes every
row of digit j. The sum of their squared changes, over all prefixes and suffixes, is

    ||Z_l^-1 X Z_r^-T||^2,    Z_l Z_l^T = (sum L^T L)^-1,    Z_r Z_r^T = (sum R R^T)^-1,

and the two sums have a closed form: the train contracted with itself. In the variables Z_l^-1 X Z_r^-T

    sum over the rows of |value - row|**2 + cost * sum over all rows of |change|**2

is a damped least squares problem for each slice. Conjugate gradients on its normal equations (CGLS, Hestenes
and Stiefel, 1952) solve it from zero and never raise it on the way. The core with the widest slices, which
has most freedom, goes first; the others then take what is left, in the same way.

Bounds: a core's step leaves the rows no further off than they were, than any larger cost would, and so, for
a cost of at most 1, than the best choice of its slices does for the table as a whole (values of the rows
given, all others as they are). A train of the rank with all of its cores chosen anew may be nearer, and is
where many rows leave (:func:`recemb.cache.refresh.write_back_cost`). A step costs all other rows
together at most what it gains, over ``cost``. Without a cost, s rows that share a digit of the widest core
are met to rounding when their s * D / q_k equations a column are independent, which takes R_{k-1} R_k of at
least that number.

Without a cost a train of low rank does not survive it: at rank 2 the change that meets a few rows is orders
of magnitude larger than the rows, and so is what it does to all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The whitened rows have norm 1 at most, so a cost of 1/20 takes some ten; none takes what a slice asks for.
_ITERATIONS = 200
# Floats that are held at once beside cores and values, 32 MB, unless the rows of one slice alone take more;
# and how many times fewer rows than another a slice may have that is solved for with it.
_GATHERED, _UNEVEN = 2**22, 4
# Of the rows' norm: float32 holds no more. And of the first gradient.
_CLOSE, _FLAT = 1e-7, 1e-6
# A direction that the rows of the table do not have, relative to the one they have most of.
_ABSENT = 1e-12


def write_rows(cores: Sequence[Tensor], digits: Tensor, values: Tensor, cost: float) -> None:
    """Bring rows of a train close to ``values``, in place.

    Args:
        cores: [p_k, R_{k-1}, q_k, R_k] each.
        digits: [E, d] int64, rows of distinct digits.
        values: [E, D].
        cost: of a squared change of any row, against a squared error of these.
    """
    wide = [core.double() for core in cores]
    order = sorted(range(len(wide)), key=lambda k: (-wide[k][0].numel(), -wide[k].shape[0]))
    lacking = values.to(torch.float64, copy=True)
    close = _CLOSE * float(lacking.norm())
    for group in _groups(wide, digits, order[0]):
        group.subtract(wide, digits, lacking)
    changed = []
    for k in order:
        if float(lacking.norm()) <= close:
            break
        whiten = _inverse_root(_left_gram(wide, k)), _inverse_root(_right_gram(wide, k))
        for group in _groups(wide, digits, k):
            group.step(wide, digits, lacking, whiten, cost)
        changed.append(k)
    for k in changed:
        cores[k].copy_(wide[k])


@dataclass(frozen=True)
class _Group:
    """J slices of a core and their rows, padded to S of each.

    Attributes:
        k: which core.
        slices: [J].
        rows: [n], which rows these are.
        places: [n], where each of them is among J * S.
        shape: (J, S).
    """

    k: int
    slices: Tensor
    rows: Tensor
    places: Tensor
    shape: tuple[int, int]

    def subtract(self, cores: Sequence[Tensor], digits: Tensor, values: Tensor) -> None:
        """Subtract what these rows are from ``values`` [E, D], of all rows with ``digits`` [E, d]."""
        left, right = self.parts(cores, digits)
        now = _product(left, cores[self.k][self.slices], right)
        values[self.rows] -= self.without_padding(now)

    def step(
        self,
        cores: Sequence[Tensor],
        digits: Tensor,
        lacking: Tensor,
        whiten: tuple[Tensor, Tensor],
        cost: float,
    ) -> None:
        """Step on these slices, and keep ``lacking`` [E, D] what all rows lack."""
        left, right = self.parts(cores, digits, whiten)
        rest = lacking.new_zeros(math.prod(self.shape), lacking.shape[1])
        rest[self.places] = lacking[self.rows]
        rest = rest.view(*left.shape[:3], cores[self.k].shape[2], right.shape[3])
        change = _least_squares((left, right, rest), cost)
        cores[self.k][self.slices] += torch.einsum("ra,jaqb,sb->jrqs", whiten[0], change, whiten[1])
        lacking[self.rows] = self.without_padding(rest)

    def without_padding(self, rows: Tensor) -> Tensor:
        """[n, D] of [J, S, m, q, n']."""
        return rows.view(math.prod(self.shape), -1)[self.places]

    def parts(
        self, cores: Sequence[Tensor], digits: Tensor, whiten: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What lies left [J, S, m, r] and right [J, S, t, n] of the core in each row, whitened.

        Args:
            cores: all.
            digits: [E, d], of all rows.
            whiten: [R, r] and [R', t].
        """
        _, rank, _, other = cores[self.k].shape
        m, n = _outside(cores, self.k)
        r, t = (rank, other) if whiten is None else (whiten[0].shape[1], whiten[1].shape[1])
        left = cores[0].new_zeros(math.prod(self.shape), m, r)
        right = cores[0].new_zeros(math.prod(self.shape), t, n)
        # A slice of another core is copied for every row: for a quarter of the room at once.
        each = max(core[0].numel() for core in cores) + 3 * (m * rank + other * n)
        size = max(1, _GATHERED // (4 * each))
        for block in (slice(at, at + size) for at in range(0, len(self.rows), size)):
            places, own = self.places[block], digits[self.rows[block]]
            before = _left_parts(cores, own, self.k)
            left.index_copy_(0, places, before if whiten is None else before @ whiten[0])
            after = _right_parts(cores, own, self.k)
            right.index_copy_(0, places, after if whiten is None else whiten[1].T @ after)
        return left.view(*self.shape, m, r), right.view(*self.shape, t, n)


def _outside(cores: Sequence[Tensor], k: int) -> tuple[int, int]:
    """m, n: how many elements of a row the cores before core k make, and those after it."""
    return math.prod(c.shape[2] for c in cores[:k]), math.prod(c.shape[2] for c in cores[k + 1 :])


def _groups(cores: Sequence[Tensor], digits: Tensor, k: int) -> Iterator[_Group]:
    """Slices of core k of about as many rows, solved for at once: they are independent of each other.

    Args:
        cores: all.
        digits: [E, d] of the rows.
        k: which core.
    """
    _, rank, q, other = cores[k].shape
    m, n = _outside(cores, k)
    # Of a slice: itself, the gradient, the direction, and the next ones of these. Of a row: what lies left
    # and right, what it lacks, its change, and the product of two of its three parts.
    per_slice, per_row = 6 * rank * q * other, m * rank + other * n + 3 * m * q * n + 2 * m * q * other
    order = torch.argsort(digits[:, k], stable=True)
    slices, sizes = torch.unique_consecutive(digits[order, k], return_counts=True)
    starts = sizes.cumsum(0) - sizes
    by_size = torch.argsort(sizes, descending=True, stable=True)
    counts = sizes[by_size].tolist()
    first = 0
    while first < len(counts):
        most, last = counts[first], first + 1
        room = _GATHERED // (per_slice + most * per_row)
        while last < len(counts) and _UNEVEN * counts[last] >= most and last + 1 - first <= room:
            last += 1
        own, place = by_size[first:last], torch.arange(most, device=order.device)
        there = place < sizes[own, None]
        rows, places = order[(starts[own, None] + place)[there]], there.flatten().nonzero().flatten()
        yield _Group(k, slices[own], rows, places, (last - first, most))
        first = last


def _product(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    """[J, S, m, q, n] of left [J, S, m, r], X [J, r, q, t] and right [J, S, t, n].

    All rows of a slice in one product of matrices: no slice is copied for each of them.
    """
    count, size, m, rank = left.shape
    q, other, n = *x.shape[2:], right.shape[3]
    middle = torch.bmm(left.view(count, size * m, rank), x.reshape(count, rank, q * other))
    rows = torch.bmm(middle.view(count * size, m * q, other), right.view(count * size, other, n))
    return rows.view(count, size, m, q, n)


def _transposed(left: Tensor, y: Tensor, right: Tensor) -> Tensor:
    """[J, r, q, t]: the same the other way round, of Y [J, S, m, q, n], summed over a slice's rows."""
    count, size, m, q, n = y.shape
    rank, other = left.shape[3], right.shape[2]
    middle = torch.bmm(y.view(count * size, m * q, n), right.view(count * size, other, n).transpose(1, 2))
    sums = torch.bmm(
        left.view(count, size * m, rank).transpose(1, 2), middle.view(count, size * m, q * other)
    )
    return sums.view(count, rank, q, other)


def _least_squares(rows: tuple[Tensor, Tensor, Tensor], cost: float) -> Tensor:
    """The X [J, r, q, t] that minimises cost |X|**2 + sum over j, s of |target_js - left_js X_j right_js|**2.

    Args:
        rows: left [J, S, m, r], right [J, S, t, n] and target [J, S, m, q, n], contiguous. What X lacks of
            the target is left in its place.
    """
    left, right, lacking = rows
    direction = gradient = _transposed(left, lacking, right)
    x = torch.zeros_like(gradient)
    square = _square(gradient)
    first, close = square, _CLOSE**2 * _square(lacking)
    for _ in range(_ITERATIONS):
        if square <= _FLAT**2 * first or _square(lacking) <= close:
            break
        image = _product(left, direction, right)
        step = square / (_square(image) + cost * _square(direction))
        x.add_(direction, alpha=step)
        lacking.sub_(image, alpha=step)
        gradient = _transposed(left, lacking, right).sub_(x, alpha=cost)
        before, square = square, _square(gradient)
        direction = torch.add(gradient, direction, alpha=square / before)
    return x


def _square(values: Tensor) -> float:
    """|values|**2, with no copy of them."""
    return float(torch.dot(values.flatten(), values.flatten()))


def _left_parts(cores: Sequence[Tensor], digits: Tensor, k: int) -> Tensor:
    """[E, q_1 .. q_{k-1}, R_{k-1}] of each row."""
    count = len(digits)
    product = cores[0].new_ones(count, 1, 1)
    for core, digit in zip(cores[:k], digits.T, strict=False):
        _, rank, q, after = core.shape
        product = torch.bmm(product, core[digit].view(count, rank, q * after)).view(count, -1, after)
    return product


def _right_parts(cores: Sequence[Tensor], digits: Tensor, k: int) -> Tensor:
    """[E, R_k, q_{k+1} .. q_d] of each row."""
    count = len(digits)
    product = cores[0].new_ones(count, 1, 1)
    for l in range(len(cores) - 1, k, -1):
        _, rank, q, after = cores[l].shape
        product = torch.bmm(cores[l][digits[:, l]].view(count, rank * q, after), product)
        product = product.view(count, rank, -1)
    return product


def _left_gram(cores: Sequence[Tensor], k: int) -> Tensor:
    """[R_{k-1}, R_{k-1}]: sum of L^T L over all prefixes of k digits."""
    total = cores[0].new_ones(1, 1)
    for core in cores[:k]:
        total = torch.einsum("rs,prqt,psqu->tu", total, core, core)
    return total


def _right_gram(cores: Sequence[Tensor], k: int) -> Tensor:
    """[R_k, R_k]: sum of R R^T over all suffixes."""
    total = cores[0].new_ones(1, 1)
    for core in reversed(cores[k + 1 :]):
        total = torch.einsum("prqt,psqu,tu->rs", core, core, total)
    return total


def _inverse_root(gram: Tensor) -> Tensor:
    """[R, r] Z with Z Z^T the inverse of ``gram`` on the directions that it has."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _ABSENT * values[-1]
    root: Tensor = vectors[:, kept] / values[kept].sqrt()
    return root
