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

from collections.abc import Sequence

import torch
from torch import Tensor

# The whitened rows have norm 1 at most, so a cost of 1/20 takes some ten; none takes what a slice asks for.
_ITERATIONS = 200
# Elements of slices that are copied for each row at once, 32 MB.
_GATHERED = 2**22
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
        q = wide[k].shape[2]
        shape = (len(digits), left.shape[1], q, right.shape[2])
        now = torch.einsum("imr,irqs,isn->imqn", left, wide[k][digits[:, k]], right)
        residual = target.view(shape) - now
        if float(residual.norm()) <= _CLOSE * float(target.norm()):
            break
        _move_slices(wide, digits, k, (left, right, residual), cost)
        changed.append(k)
    for k in changed:
        cores[k].copy_(wide[k])


def _move_slices(
    cores: Sequence[Tensor], digits: Tensor, k: int, rows: tuple[Tensor, Tensor, Tensor], cost: float
) -> None:
    """Step on the slices of core k; ``rows`` are their parts left and right, and what they lack."""
    whiten_left = _inverse_root(_left_gram(cores, k))
    whiten_right = _inverse_root(_right_gram(cores, k))
    left, right, residual = rows[0] @ whiten_left, whiten_right.T @ rows[1], rows[2]
    order = torch.argsort(digits[:, k], stable=True)
    slices, index, sizes = torch.unique_consecutive(digits[order, k], return_inverse=True, return_counts=True)
    first, taken, room = 0, 0, max(1, _GATHERED // cores[k][0].numel())
    bounds = [0, *sizes.cumsum(0).tolist()]
    for last in range(1, len(bounds)):
        if last < len(bounds) - 1 and bounds[last + 1] - taken <= room:
            continue
        # Slices are independent of each other, so as many as fit are solved for at once.
        own, part = order[taken : bounds[last]], index[taken : bounds[last]] - first
        change = _least_squares((left[own], right[own], residual[own]), part, last - first, cost)
        cores[k][slices[first:last]] += torch.einsum("ra,jaqb,sb->jrqs", whiten_left, change, whiten_right)
        first, taken = last, bounds[last]


def _least_squares(rows: tuple[Tensor, Tensor, Tensor], index: Tensor, count: int, cost: float) -> Tensor:
    """The X [J, r, q, t] that minimises cost |X|**2 + sum over i of |target_i - left_i X_j(i) right_i|**2.

    Args:
        rows: left [s, m, r], right [s, t, n] and target [s, m, q, n].
        index: [s] j(i), which slice each row has.
        count: J.
    """
    left, right, target = rows
    size, m, rank = left.shape
    q, other = target.shape[2], right.shape[1]

    def forward(x: Tensor) -> Tensor:
        middle = torch.bmm(left, x[index].view(size, rank, q * other)).view(size, m * q, other)
        return torch.bmm(middle, right).view(target.shape)

    def adjoint(y: Tensor) -> Tensor:
        middle = torch.bmm(y.reshape(size, m * q, -1), right.transpose(1, 2)).view(size, m, q * other)
        each = torch.bmm(left.transpose(1, 2), middle).view(size, rank, q, other)
        return target.new_zeros(count, rank, q, other).index_add_(0, index, each)

    x = target.new_zeros(count, rank, q, other)
    residual = target.clone()
    direction = gradient = adjoint(residual)
    square = float(gradient.square().sum())
    first, close = square, (_CLOSE * float(target.norm())) ** 2
    for _ in range(_ITERATIONS):
        if square <= _FLAT**2 * first or float(residual.square().sum()) <= close:
            break
        image = forward(direction)
        step = square / (float(image.square().sum()) + cost * float(direction.square().sum()))
        x += step * direction
        residual -= step * image
        gradient = adjoint(residual) - cost * x
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
