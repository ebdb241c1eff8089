"""Writing single rows into a tensor train at the least cost to the other rows.

Core k of a row with digits (i_1 .. i_d) is sandwiched between what lies left and right of it,

    row = L G_k[i_k] R,    L [q_1 .. q_{k-1}, R_{k-1}],    R [R_k, q_{k+1} .. q_d],

so with the other cores held the rows are linear in the slices of core k. Changing slice j by X changes every
row of digit j. The sum of their squared changes, over all prefixes and suffixes, is

    ||Z_l^-1 X Z_r^-T||^2,    Z_l Z_l^T = (sum L^T L)^-1,    Z_r Z_r^T = (sum R R^T)^-1,

and the two sums have a closed form: the train contracted with itself. So the change that brings the given
rows closest to their values, and among those the one that costs all rows of the table least, is the least
squares solution of least norm in the variables Z_l^-1 X Z_r^-T. Conjugate gradients on the normal equations
(CGLS, Hestenes and Stiefel, 1952) find it from zero, never raise the residual on the way, and leave out of it
what would need a large change to gain little.

Bound: s rows that share a digit of the core with the widest slices are met to rounding when their
D / q_k * s equations a column are independent, for which R_{k-1} R_k must be as many at least. Beyond that the
rows come as close as the slices allow, one core after the other, and are never further off than before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of a group of rows; a well posed one takes about as many as it has equations, up to some tens.
_ITERATIONS = 200
# Of the rows' norm: float32 holds no more. And of the first gradient: the rest needs changes out of proportion.
_CLOSE, _FLAT = 1e-7, 1e-6
# A direction that the rows of the table do not have, relative to the one they have most of.
_ABSENT = 1e-12


def write_rows(cores: Sequence[Tensor], digits: Tensor, values: Tensor) -> None:
    """Bring rows of a train close to ``values``, in place.

    Args:
        cores: [p_k, R_{k-1}, q_k, R_k] each.
        digits: [E, d] int64, rows of distinct digits.
        values: [E, D].
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
        _move_slices(wide, digits, k, (left, right), residual)
        changed.append(k)
    for k in changed:
        cores[k].copy_(wide[k])


def _move_slices(
    cores: Sequence[Tensor], digits: Tensor, k: int, sides: tuple[Tensor, Tensor], residual: Tensor
) -> None:
    """Add to the slices of core k what brings ``residual`` [E, m, q, n] closest to 0."""
    whiten_left = _inverse_root(_left_gram(cores, k))
    whiten_right = _inverse_root(_right_gram(cores, k))
    left, right = sides[0] @ whiten_left, whiten_right.T @ sides[1]
    slices, sizes = torch.unique(digits[:, k], return_counts=True)
    groups = torch.argsort(digits[:, k], stable=True).split(sizes.tolist())
    for slice_, rows in zip(slices.tolist(), groups, strict=True):
        change = _least_squares(left[rows], right[rows], residual[rows])
        cores[k][slice_] += torch.einsum("ra,aqb,sb->rqs", whiten_left, change, whiten_right)


def _least_squares(left: Tensor, right: Tensor, target: Tensor) -> Tensor:
    """The X [r, q, t] of least norm that minimises the sum over i of |target_i - left_i X right_i|**2.

    Args:
        left: [s, m, r].
        right: [s, t, n].
        target: [s, m, q, n].
    """
    count, rows, rank = left.shape
    q, other = target.shape[2], right.shape[1]
    flat = left.reshape(count * rows, rank)

    def forward(x: Tensor) -> Tensor:
        middle = (flat @ x.view(rank, q * other)).view(count, rows * q, other)
        return torch.bmm(middle, right).view(target.shape)

    def adjoint(y: Tensor) -> Tensor:
        middle = torch.bmm(y.reshape(count, rows * q, -1), right.transpose(1, 2))
        return (flat.T @ middle.view(count * rows, q * other)).view(rank, q, other)

    x = target.new_zeros(rank, q, other)
    residual = target.clone()
    direction = gradient = adjoint(residual)
    size = float(gradient.square().sum())
    first, close = size, (_CLOSE * float(target.norm())) ** 2
    for _ in range(_ITERATIONS):
        if size <= _FLAT**2 * first or float(residual.square().sum()) <= close:
            break
        image = forward(direction)
        step = size / float(image.square().sum())
        x += step * direction
        residual -= step * image
        gradient = adjoint(residual)
        before, size = size, float(gradient.square().sum())
        direction = gradient + (size / before) * direction
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
