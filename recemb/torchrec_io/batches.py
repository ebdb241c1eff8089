"""A :class:`recemb.data.click_log.ClickBatch` as torchrec's ``Batch``, without copying it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.data.click_log import ClickBatch
from recemb.errors import BatchError


def to_batch(
    clicks: ClickBatch, feature_names: Sequence[str], hash_sizes: Sequence[int | None] | None = None
) -> Batch:
    """Wrap one batch of clicks for a torchrec model.

    With B rows, F features and I dense columns::

        clicks.dense  [B, I] float32  ->  batch.dense_features [B, I], same memory
        clicks.ids    [F, B] int64    ->  batch.sparse_features, a KeyedJaggedTensor of one id a bag
        clicks.labels [B]    float32  ->  batch.labels [B], same memory

    Args:
        clicks: the batch; ids are feature-major, which is a KeyedJaggedTensor's own order.
        feature_names: F names, in the order of the rows of ``clicks.ids``.
        hash_sizes: per feature, the number of rows that ids are folded into by ``id mod rows`` (the hashing
            trick), or ``None`` to use the ids as they are. Folding makes a new array.

    Raises:
        BatchError: the arrays do not fit together or have other types.
    """
    _check(clicks, len(feature_names))
    ids = clicks.ids if hash_sizes is None else _fold(clicks.ids, hash_sizes)
    num_features, num_rows = ids.shape
    # One id a bag: lengths and offsets are known, so nothing has to be read back from a device.
    sparse = KeyedJaggedTensor(
        keys=list(feature_names),
        values=_share(np.ascontiguousarray(ids).reshape(-1)),
        lengths=torch.ones(num_features * num_rows, dtype=torch.int64, device="cpu"),
        offsets=torch.arange(num_features * num_rows + 1, dtype=torch.int64, device="cpu"),
        stride=num_rows,
        length_per_key=[num_rows] * num_features,
        offset_per_key=[num_rows * feature for feature in range(num_features + 1)],
    )
    return Batch(dense_features=_share(clicks.dense), sparse_features=sparse, labels=_share(clicks.labels))


def blank_row(feature_names: Sequence[str], num_dense: int) -> Batch:
    """A batch of one row: dense features 0, label 0, and no id in any bag."""
    sparse = KeyedJaggedTensor(
        keys=list(feature_names),
        values=torch.empty(0, dtype=torch.int64, device="cpu"),
        lengths=torch.zeros(len(feature_names), dtype=torch.int64, device="cpu"),
    )
    return Batch(torch.zeros(1, num_dense, device="cpu"), sparse, torch.zeros(1, device="cpu"))


def _share(array: npt.NDArray[np.generic]) -> Tensor:
    # torch has no read-only tensors: memory that numpy guards (a file mapping) is copied instead.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _fold(ids: npt.NDArray[np.int64], hash_sizes: Sequence[int | None]) -> npt.NDArray[np.int64]:
    folded = ids.copy()
    for row, size in zip(folded, hash_sizes, strict=True):
        if size is not None:
            np.remainder(row, size, out=row)
    return folded


def _check(clicks: ClickBatch, num_features: int) -> None:
    rows = len(clicks.labels)
    for name, array, dtype, shape in (
        ("dense", clicks.dense, np.float32, (rows, *clicks.dense.shape[1:])),
        ("ids", clicks.ids, np.int64, (num_features, rows)),
        ("labels", clicks.labels, np.float32, (rows,)),
    ):
        if array.dtype != dtype or array.shape != shape:
            raise BatchError(
                f"batch {name} is {array.dtype}{list(array.shape)}, expected {np.dtype(dtype)}{list(shape)}"
            )
