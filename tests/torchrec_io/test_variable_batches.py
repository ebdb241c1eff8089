"""Batches with a batch size per feature (VBE): torchrec's bits, or an error that says what is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import recemb
from recemb.bags import LookupTarget, LookupTargets
from recemb.errors import BatchError
from recemb.torchrec_io.kjt import check_kjt
from tests.torchrec_io.test_embedding_bag_collection import (
    COMPRESSIONS,
    assert_same_bits,
    both,
    shared_configs,
)


def variable_batch(weights: Tensor | None = None) -> KeyedJaggedTensor:
    """Batch sizes 2, 1 and 3, each expanded to 4 samples."""
    return KeyedJaggedTensor(
        keys=["f0", "f1", "f2"],
        values=torch.tensor([0, 1, 9, 3, 3, 2, 5]),
        lengths=torch.tensor([2, 1, 2, 0, 1, 1]),
        weights=weights,
        stride_per_key_per_rank=[[2], [1], [3]],
        inverse_indices=(["f0", "f1", "f2"], torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [2, 1, 0, 2]])),
    )


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_variable_batch_sizes_give_torchrecs_bits(pooling: PoolingType) -> None:
    ours, theirs = both(shared_configs(pooling=pooling))
    assert ours(variable_batch()).values().shape == (4, 20)
    assert_same_bits(ours, theirs, variable_batch())


def test_variable_batch_sizes_with_weights_and_compression() -> None:
    weights = torch.linspace(-1, 2, 7)
    assert_same_bits(*both(shared_configs(), is_weighted=True), variable_batch(weights))
    for compression in COMPRESSIONS:
        ours, theirs = both(shared_configs(compression=compression), is_weighted=True)
        kjt = variable_batch(weights)
        torch.testing.assert_close(ours(kjt).values(), theirs(kjt).values(), rtol=1e-5, atol=1e-6)


def test_inverse_indices_with_equal_batch_sizes_expand_too() -> None:
    kjt = KeyedJaggedTensor(
        keys=["f0", "f1", "f2"],
        values=torch.tensor([0, 1, 9, 3, 3, 2, 5, 9]),
        lengths=torch.tensor([2, 0, 1, 0, 2, 3]),
        inverse_indices=(["f2", "f0", "f1"], torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0]])),
    )
    assert_same_bits(*both(shared_configs()), kjt)


@pytest.mark.parametrize("bag", [1, 2, -1])
def test_f11_inverse_indices_outside_the_features_batch_are_refused(bag: int) -> None:
    """A short feature is padded to the longest batch; its padding is no bag to be pointed at."""
    kjt = variable_batch()
    _, indices = kjt.inverse_indices()
    indices[1, 2] = bag
    ours = recemb.EmbeddingBagCollection(tables=shared_configs())
    with pytest.raises(BatchError, match=rf"inverse_indices.*'f1', sample 2: {bag} is outside \[0, 1\)"):
        ours(kjt)


def test_f11_variable_batches_need_inverse_indices_for_every_feature() -> None:
    ours = recemb.EmbeddingBagCollection(tables=shared_configs())
    more: dict[str, Any] = {
        "keys": ["f0", "f1", "f2"],
        "values": torch.tensor([0, 1]),
        "lengths": torch.tensor([1, 1, 0, 0]),
        "stride_per_key_per_rank": [[1], [1], [2]],
    }
    with pytest.raises(BatchError, match="no inverse_indices"):
        ours(KeyedJaggedTensor(**more))
    with pytest.raises(BatchError, match="no entry for feature 'f2'"):
        ours(KeyedJaggedTensor(**more, inverse_indices=(["f0", "f1"], torch.zeros(2, 3, dtype=torch.int64))))


EQUAL = [
    (["f0", "f1", "f2"], [[2], [2], [2]], [2, 1, 1, 2, 0, 3]),
    (["f0", "f1", "f2"], [[1, 1], [1, 1], [1, 1]], [2, 1, 1, 2, 0, 3]),
    (["f2", "f0", "f1"], [[2], [2], [2]], [2, 1, 1, 2, 0, 3]),
    # Keys that no table looks up may have any batch size.
    (["f0", "other", "f1", "f2"], [[2], [1], [2], [2]], [2, 1, 5, 1, 2, 0, 3]),
    (["f0", "other", "f1", "f2"], [[2], [4], [2], [2]], [2, 1, 5, 0, 1, 1, 1, 2, 0, 3]),
    (["f2", "f0", "f1", "other"], [[2], [2], [2], [3]], [2, 1, 1, 2, 0, 3, 1, 0, 2]),
    (["f0", "other", "f1", "f2"], [[0], [2], [0], [0]], [2, 1]),
]


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("keys", "strides", "lengths"), EQUAL)
def test_one_batch_size_needs_no_inverse_indices(
    keys: list[str], strides: list[list[int]], lengths: list[int], is_weighted: bool
) -> None:
    kjt = KeyedJaggedTensor(
        keys=keys,
        values=torch.arange(sum(lengths)) % 9,
        lengths=torch.tensor(lengths),
        weights=torch.linspace(-1, 2, sum(lengths)) if is_weighted else None,
        stride_per_key_per_rank=strides,
    )
    assert kjt.variable_stride_per_key()
    ours, theirs = both(shared_configs(), is_weighted=is_weighted)
    assert ours(kjt).values().shape == (sum(strides[0]), 20)
    assert_same_bits(ours, theirs, kjt)


def test_a_refusal_names_the_batch_sizes_of_what_is_looked_up() -> None:
    ours = recemb.EmbeddingBagCollection(tables=shared_configs())
    kjt = KeyedJaggedTensor(
        keys=["f0", "other", "f1", "f2"],
        values=torch.arange(5),
        lengths=torch.ones(5, dtype=torch.int64),
        stride_per_key_per_rank=[[1], [1], [2], [1]],
    )
    with pytest.raises(BatchError, match=r"differ \(\{'f0': 1, 'f1': 2, 'f2': 1\}\).*no inverse_indices"):
        ours(kjt)


def test_sharded_tables_need_them_whatever_the_batch_sizes() -> None:
    kjt = KeyedJaggedTensor(
        keys=["f0"],
        values=torch.arange(2),
        lengths=torch.ones(2, dtype=torch.int64),
        stride_per_key_per_rank=[[1, 1]],
    )
    with pytest.raises(BatchError, match="no inverse_indices, which sharded tables need"):
        check_kjt(kjt, LookupTargets([LookupTarget("f0", "t", 9)]), is_weighted=False)
