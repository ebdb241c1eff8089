"""ClickBatch -> torchrec Batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recemb.data.click_log import ClickBatch
from recemb.errors import BatchError
from recemb.torchrec_io.batches import blank_row, to_batch

NAMES = ["cat_0", "cat_1", "cat_2"]


def clicks(rows: int = 4, largest: int = 2**40) -> ClickBatch:
    rng = np.random.default_rng(0)
    return ClickBatch(
        dense=rng.random((rows, 5), dtype=np.float32),
        ids=rng.integers(0, largest, (3, rows)),
        labels=rng.integers(0, 2, rows).astype(np.float32),
    )


def test_shares_memory_and_keeps_64_bit_ids() -> None:
    source = clicks()
    batch = to_batch(source, NAMES)
    sparse = batch.sparse_features
    assert batch.dense_features.data_ptr() == source.dense.ctypes.data
    assert batch.labels.data_ptr() == source.labels.ctypes.data
    assert sparse.values().data_ptr() == source.ids.ctypes.data
    assert sparse.values().dtype == torch.int64
    assert sparse.keys() == NAMES
    assert sparse.stride() == 4
    for name, ids in zip(NAMES, source.ids, strict=True):
        assert sparse[name].values().tolist() == ids.tolist()
        assert sparse[name].lengths().tolist() == [1] * 4


def test_offsets_agree_with_what_torchrec_computes() -> None:
    sparse = to_batch(clicks(), NAMES).sparse_features
    assert sparse.offsets().tolist() == torch.cumsum(torch.tensor([0] + [1] * 12), 0).tolist()
    assert sparse.length_per_key() == [4, 4, 4]
    assert sparse.offset_per_key() == [0, 4, 8, 12]


def test_empty_batch() -> None:
    batch = to_batch(clicks(rows=0), NAMES)
    assert batch.sparse_features.stride() == 0
    assert batch.dense_features.shape == (0, 5)


def test_folds_ids_of_the_features_asked_for() -> None:
    source = clicks()
    before = source.ids.copy()
    sparse = to_batch(source, NAMES, [7, None, 1]).sparse_features
    assert sparse["cat_0"].values().tolist() == [int(i) % 7 for i in before[0]]
    assert sparse["cat_1"].values().tolist() == before[1].tolist()
    assert sparse["cat_2"].values().tolist() == [0] * 4
    assert np.array_equal(source.ids, before)


@pytest.mark.filterwarnings("error")
def test_read_only_and_strided_arrays_are_copied() -> None:
    source = clicks()
    source.dense.flags.writeable = False
    strided = ClickBatch(source.dense, np.asfortranarray(source.ids), source.labels)
    batch = to_batch(strided, NAMES)
    assert batch.sparse_features.values().tolist() == source.ids.ravel().tolist()
    batch.dense_features.zero_()
    assert source.dense.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((2, 4), np.int64)}, r"ids is int64\[2, 4\], expected int64\[3, 4\]"),
        ({"ids": np.zeros((3, 4), np.float32)}, r"ids is float32"),
        ({"dense": np.zeros((3, 5), np.float32)}, r"dense is float32\[3, 5\], expected float32\[4, 5\]"),
        ({"labels": np.zeros(4, np.int64)}, r"labels is int64"),
    ],
)
def test_arrays_that_do_not_fit(change: dict[str, np.ndarray], message: str) -> None:
    source = clicks()
    parts = {"dense": source.dense, "ids": source.ids, "labels": source.labels} | change
    with pytest.raises(BatchError, match=message):
        to_batch(ClickBatch(**parts), NAMES)


def test_all_of_a_batch_is_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        batches = [to_batch(clicks(), NAMES), blank_row(NAMES, 5)]
    for batch in batches:
        sparse = batch.sparse_features
        for tensor in (
            batch.dense_features,
            batch.labels,
            sparse.values(),
            sparse.lengths(),
            sparse.offsets(),
        ):
            assert tensor.is_cpu
