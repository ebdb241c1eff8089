"""The arithmetic and the memory traffic that a step cannot do without, to be held against the floor.

Counted a batch: every weight that it touches is read once forward, and read and written once by the update;
pooled rows are written, their gradients read, ids read. Optimizer state, indices and workspaces are left out.
Backward costs twice the arithmetic of forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from bench.ids import Batch
from bench.ours import table_specs
from bench.settings import AT_HAND, DENSE, EMPTY, FORWARD, TLTORCH, TT, Setting, is_ours
from recemb import ROBE, MixedDimension, QuotientRemainder, TensorTrain
from recemb.backends.tt_shapes import core_sizes, table_shapes
from recemb.spec import TableSpec

_SAMPLED_BATCHES = 4
_FLOAT, _ID = 4, 8
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """Of one step.

    Args:
        flop: arithmetic.
        weights: bytes of weights, which lie anywhere.
        streams: bytes of pooled rows, their gradients and ids, which lie in a row.
    """

    flop: float
    weights: float
    streams: float

    @property
    def nbytes(self) -> float:
        """All bytes."""
        return self.weights + self.streams


def distinct_ids(setting: Setting, batches: Sequence[Batch]) -> float:
    """Mean number of distinct (table, id) pairs of a batch."""
    sample = batches[:_SAMPLED_BATCHES]
    return float(np.mean([sum(len(ids) for ids in _per_table(setting, batch)) for batch in sample]))


def work(case: str, path: str, setting: Setting, batches: Sequence[Batch]) -> Work:
    """What a case does at a setting, the mean over a few of the batches."""
    if case == EMPTY:
        return Work(0, 0, 0)
    touched, flop = _touched_and_flop(case, setting, batches)
    lookups = setting.batch * setting.hots * len(setting.rows)
    outputs = setting.batch * setting.dim * len(setting.rows)
    # Adding up the rows of a bag.
    flop += lookups * setting.dim
    passes = 1 if path == FORWARD else 3
    streams = _FLOAT * min(passes, 2) * outputs + _ID * lookups
    return Work(passes * flop, _FLOAT * passes * touched, streams)


def touched_bytes(case: str, setting: Setting, batches: Sequence[Batch]) -> int:
    """Bytes of the weights that a step reads, each counted once: the mean over a few of the batches."""
    return int(_FLOAT * _touched_and_flop(case, setting, batches)[0])


def _touched_and_flop(case: str, setting: Setting, batches: Sequence[Batch]) -> tuple[float, float]:
    sample = batches[:_SAMPLED_BATCHES]
    specs = _specs(case, setting)
    touched = flop = 0.0
    for batch in sample:
        for spec, ids in zip(specs, _per_table(setting, batch), strict=True):
            weights, arithmetic = _forward(spec, ids)
            touched += weights / len(sample)
            flop += arithmetic / len(sample)
    return touched, flop


def _specs(case: str, setting: Setting) -> list[TableSpec]:
    if case.startswith(TLTORCH):
        case = TT + case.removeprefix(TLTORCH)
    if is_ours(case):
        # As many rows, wherever they lie.
        return table_specs(DENSE if case == AT_HAND else case, setting.rows, setting.dim)
    return [
        TableSpec(name=f"t_{k}", num_embeddings=n, embedding_dim=setting.dim)
        for k, n in enumerate(setting.rows)
    ]


@lru_cache(maxsize=_SAMPLED_BATCHES)
def _per_table(setting: Setting, batch: Batch) -> list[Ids]:
    """The distinct ids of each table, sorted; every case on every path asks for those of the same batches."""
    return [np.unique(ids) for ids in np.split(batch.ids.numpy(), len(setting.rows))]


def _forward(spec: TableSpec, ids: Ids) -> tuple[float, float]:
    """Weights touched and arithmetic done to rebuild the distinct rows of one table."""
    dim, compression = spec.embedding_dim, spec.compression
    if isinstance(compression, TensorTrain):
        return _tensor_train(spec, compression, ids)
    rows = len(np.unique(ids % spec.num_embeddings))
    if isinstance(compression, QuotientRemainder):
        c = compression.collisions
        parts = len(np.unique(ids // c)) + len(np.unique(ids % c))
        return dim * parts, dim * rows
    if isinstance(compression, MixedDimension):
        return compression.dim * (rows + dim), 2 * compression.dim * dim * rows
    if isinstance(compression, ROBE):
        return min(rows * dim, spec.dense_numel / compression.compress_rate), 0
    return rows * dim, 0


def _tensor_train(spec: TableSpec, compression: TensorTrain, ids: Ids) -> tuple[float, float]:
    """Slices touched, and products when each is computed once per distinct prefix of the digits."""
    row_shape, dim_shape = table_shapes(spec)
    ranks, sizes = compression.ranks, core_sizes(dim_shape, compression.ranks)
    weights = flop = 0.0
    for k, size in enumerate(sizes):
        prefixes = np.unique(ids // int(np.prod(row_shape[k + 1 :], dtype=np.int64)))
        weights += size * len(np.unique(prefixes % row_shape[k]))
        if k:
            columns = int(np.prod(dim_shape[:k], dtype=np.int64))
            flop += 2 * columns * ranks[k] * dim_shape[k] * ranks[k + 1] * len(prefixes)
    return weights, flop
