"""Batches of ids: Zipf in frequency order, Zipf at random places, uniform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.settings import BASE, SCALE_RANK, TREE_OF_1G, G, Setting
from recemb.backends.tt_shapes import tt_shapes
from recemb.data.zipf import BoundedZipf
from recemb.spec import TensorTrain

EXPONENT = 1.05
# An odd multiplier with well spread bits (Steele, Lea and Flood's SplitMix64), and an offset that moves 0.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_OFFSET = np.uint64(0xD1B54A32D192ED03)
_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's input, built before the clock starts.

    Args:
        ids: [F * B * hots] int64, feature by feature.
        offsets: [F * B + 1] int64.
        lengths: [F * B] int64, for the paths that start from a KeyedJaggedTensor.
        grad: [B, F * D], the gradient of the pooled rows.
        places: [F * B * hots] int64, of each id its place among the distinct ones that its feature has here.
    """

    ids: Tensor
    offsets: Tensor
    lengths: Tensor
    grad: Tensor
    places: Tensor

    def to(self, device: str) -> Batch:
        """A copy on another device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def number_of_batches(batch: int) -> int:
    """Many, so that rare rows are cold when they come up, as in training; fewer of large ones."""
    return 64 if batch <= 4096 else 16


def make_batches(setting: Setting, seed: int = 0) -> list[Batch]:
    """The distinct batches of a setting, equal for equal seeds."""
    generator = np.random.default_rng(seed)
    features, size = len(setting.rows), setting.batch * setting.hots
    offsets = torch.arange(features * setting.batch + 1) * setting.hots
    lengths = torch.full((features * setting.batch,), setting.hots)
    grad = torch.randn(setting.batch, features * setting.dim, generator=torch.Generator().manual_seed(seed))
    batches = []
    for _ in range(number_of_batches(setting.batch)):
        drawn = [draw(setting.ids, rows, size, generator) for rows in setting.rows]
        places = [np.unique(ids, return_inverse=True)[1] for ids in drawn]
        batches.append(Batch(_joined(drawn), offsets, lengths, grad, _joined(places)))
    return batches


def _joined(features: Sequence[npt.NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(features))


def draw(kind: str, rows: int, size: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """``size`` ids in [0, rows): 0 is the most frequent one of ``zipf``.

    ``TREE_OF_1G``: the Zipf ids of a billion rows, laid on the train of D = 16 and rank ``SCALE_RANK``
    that a table of ``rows`` rows has.
    """
    if kind == "uniform":
        return generator.integers(rows, size=size)
    if kind == TREE_OF_1G:
        wide, narrow = (tt_shapes(n, BASE.dim, TensorTrain(rank=SCALE_RANK))[0][-1] for n in (G, rows))
        return lay_tree(draw("zipf", G, size, generator), wide, rows, narrow)
    ids = BoundedZipf(rows, EXPONENT).sample(generator, size) - 1
    return permute(ids, rows) if kind == "permuted" else ids


def lay_tree(ids: npt.NDArray[np.int64], wide: int, rows: int, narrow: int) -> npt.NDArray[np.int64]:
    """Ids of a table of ``rows`` rows with as many distinct rows and prefixes as ``ids``, each row as often.

    A prefix is an id without its last digit, which has ``wide`` values in ``ids`` and ``narrow`` in the
    result. What is more below a prefix goes to others, one each in turn. The k-th prefix has the same place
    in every batch; which prefixes share a shorter one is not kept.

    Raises:
        ValueError: the table has fewer prefixes than ``ids``, or these no room for the rows.
    """
    generator = np.random.default_rng(0)
    distinct, row = np.unique(ids, return_inverse=True)
    prefixes, first, above, sizes = np.unique(
        distinct // wide, return_index=True, return_inverse=True, return_counts=True
    )
    if len(prefixes) > rows // narrow:
        raise ValueError(f"{len(prefixes)} prefixes do not fit a table of {rows // narrow}")
    if len(distinct) > len(prefixes) * narrow:
        raise ValueError(f"{len(distinct)} rows do not fit {len(prefixes)} prefixes of {narrow}")
    places = generator.permutation(rows // narrow)
    starts = generator.integers(narrow, size=len(places))
    ranks = np.arange(len(distinct)) - first[above]
    room = np.maximum(narrow - sizes, 0)
    homes = np.repeat(np.arange(len(prefixes)), room)
    turns = np.arange(len(homes)) - np.repeat(np.cumsum(room) - room, room)
    more = np.flatnonzero(ranks >= narrow)
    taken = np.lexsort((homes, turns))[: len(more)]
    above[more] = homes[taken]
    ranks[more] = sizes[homes[taken]] + turns[taken]
    laid: npt.NDArray[np.int64] = (places[above] * narrow + (starts[above] + ranks) % narrow)[row]
    return laid


def permute(ids: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.int64]:
    """A bijection of [0, rows) that leaves no trace of the order, without an array of ``rows`` entries.

    Xor-shifts and odd multiplications are bijections of the next power of two; a value that lands outside
    [0, rows) is mapped again until it lands inside (cycle walking), which keeps the whole a bijection.
    """
    bits = (rows - 1).bit_length()
    if not bits:
        return np.zeros_like(ids)
    values = ids.astype(np.uint64)
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _mix(values[outside], bits)
        outside = outside[values[outside] >= np.uint64(rows)]
    return values.astype(np.int64)


def _mix(values: npt.NDArray[np.uint64], bits: int) -> npt.NDArray[np.uint64]:
    mask, shift = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    for _ in range(_ROUNDS):
        values = (values * _MULTIPLIER + _OFFSET) & mask
        values = values ^ (values >> shift)
    return values
