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
given, all others as they are): the rank's best approximation, one core at a time. It costs all other rows
together at most what it gains, over ``cost``. Without a cost, s rows that share a digit of the widest core
are met to rounding when their s * D / q_k equations a column are independent, which takes R_{k-1} R_k of at
least that number.

Without a cost a train of low rank does not survive it: at rank 2 the change that meets a few rows is orders
of magnitude larger than the rows, and so is what it does to all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# The whitened rows have norm 1 at most, so a cost of 1/20 takes some ten; none takes what a slice asks for.
_ITERATIONS = 200
# Elements of rows whose slices are solved for at once, 8 MB, and how many times fewer rows than another a
# slice of these may have.
_GATHERED, _UNEVEN = 2**20, 4
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
    target = values.double()
    order = sorted(range(len(wide)), key=lambda k: (-wide[k][0].numel(), -wide[k].shape[0]))
    changed = []
    for k in order:
        left, right = _left_parts(wide, digits, k), _right_parts(wide, digits, k)
        target = target.view(len(digits), left.shape[1], wide[k].shape[2], right.shape[2])
        grouped = _grouped(digits[:, k], target)
        groups = [_Group(*members, left, right, target, wide[k]) for members in grouped]
        lacking = math.hypot(*(float(group.residual.norm()) for group in groups))
        if lacking <= _CLOSE * float(target.norm()):
            break
        whiten_left, whiten_right = _inverse_root(_left_gram(wide, k)), _inverse_root(_right_gram(wide, k))
        for group in groups:
            rows = group.left @ whiten_left, whiten_right.T @ group.right, group.residual
            change = _least_squares(rows, cost)
            wide[k][group.slices] += torch.einsum("ra,jaqb,sb->jrqs", whiten_left, change, whiten_right)
        changed.append(k)
    for k in changed:
        cores[k].copy_(wide[k])


class _Group:
    """J slices of a core and their rows, S of each; where a slice has fewer, those are zero.

    Args:
        slices: [J].
        rows: [J, S].
        there: [J, S] bool, which of them there are.
        left: [E, m, R], of all rows, as :func:`_left_parts` gives it.
        right: [E, R', n].
        target: [E, m, q, n], what the rows are to be.
        core: [p, R, q, R'].

    Attributes:
        left: [J, S, m, R].
        right: [J, S, R', n].
        residual: [J, S, m, q, n], what they lack.
    """

    def __init__(
        self,
        slices: Tensor,
        rows: Tensor,
        there: Tensor,
        left: Tensor,
        right: Tensor,
        target: Tensor,
        core: Tensor,
    ) -> None:
        self.slices, self.right = slices, right[rows]
        self.left = left[rows] * there[:, :, None, None]
        self.residual = target[rows] * there[:, :, None, None, None] - _product(
            self.left, core[slices], self.right
        )


def _grouped(digits: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Slices of about as many rows, which are solved for at once: they are independent of each other.

    Args:
        digits: [E] of the rows.
        target: [E, ...].

    Yields:
        ``slices``, ``rows`` and ``there`` of a :class:`_Group`.
    """
    order = torch.argsort(digits, stable=True)
    slices, sizes = torch.unique_consecutive(digits[order], return_counts=True)
    starts = sizes.cumsum(0) - sizes
    by_size = torch.argsort(sizes, descending=True, stable=True)
    counts, room = sizes[by_size].tolist(), max(1, _GATHERED // target[:1].numel())
    first = 0
    while first < len(counts):
        most, last = counts[first], first + 1
        while last < len(counts) and _UNEVEN * counts[last] >= most and (last + 1 - first) * most <= room:
            last += 1
        own, place = by_size[first:last], torch.arange(most, device=order.device)
        rows = order[(starts[own, None] + place).clamp(max=len(order) - 1)]
        yield slices[own], rows, place < sizes[own, None]
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
        rows: left [J, S, m, r], right [J, S, t, n] and target [J, S, m, q, n], contiguous.
    """
    left, right, target = rows
    residual = target.clone()
    direction = gradient = _transposed(left, residual, right)
    x = torch.zeros_like(gradient)
    square = float(gradient.square().sum())
    first, close = square, (_CLOSE * float(target.norm())) ** 2
    for _ in range(_ITERATIONS):
        if square <= _FLAT**2 * first or float(residual.square().sum()) <= close:
            break
        image = _product(left, direction, right)
        step = square / (float(image.square().sum()) + cost * float(direction.square().sum()))
        x += step * direction
        residual -= step * image
        gradient = _transposed(left, residual, right) - cost * x
        before, square = square, float(gradient.square().sum())
        direction = gradient + (square / before) * direction
    return x


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
