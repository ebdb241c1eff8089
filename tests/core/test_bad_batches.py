"""Bad batches through ``EmbeddingBagCollection``, every method: a clear error, and nothing has changed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import recemb
from recemb.errors import BatchError
from recemb.spec import Compression

METHODS: list[Compression] = [
    recemb.Dense(),
    recemb.TensorTrain(rank=2),
    recemb.QuotientRemainder(collisions=3),
    recemb.ROBE(compress_rate=2, block_size=2),
    recemb.MixedDimension(dim=2),
]
every_method = pytest.mark.parametrize("compression", METHODS, ids=lambda c: c.method)
INT64_MIN = -(2**63)


def collection(compression: Compression, is_weighted: bool = False) -> recemb.EmbeddingBagCollection:
    return recemb.EmbeddingBagCollection(
        tables=[
            recemb.EmbeddingBagConfig(
                name="users", num_embeddings=10, embedding_dim=4, feature_names=["u"], compression=compression
            ),
            recemb.EmbeddingBagConfig(
                name="goods",
                num_embeddings=20,
                embedding_dim=4,
                feature_names=["i", "j"],
                compression=compression,
            ),
        ],
        is_weighted=is_weighted,
    )


def batch(**change: Any) -> KeyedJaggedTensor:
    """Samples 0, 1, 2 of u: [1, 2], [], [3]; of i: [4], [5], [6]; of j: [], [7, 8, 9], []."""
    fields: dict[str, Any] = {
        "keys": ["u", "i", "j"],
        "values": torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9]),
        "lengths": torch.tensor([2, 0, 1, 1, 1, 1, 0, 3, 0]),
    }
    fields.update(change)
    return KeyedJaggedTensor(**{name: value for name, value in fields.items() if value is not None})


def refused(ebc: recemb.EmbeddingBagCollection, kjt: KeyedJaggedTensor, *parts: str) -> str:
    """The lookup raises, names every part, and no weight or gradient has changed."""
    before = {name: parameter.detach().clone() for name, parameter in ebc.named_parameters()}
    with pytest.raises(BatchError) as caught:
        ebc(kjt)
    message = str(caught.value)
    for part in parts:
        assert re.search(part, message), message
    for name, parameter in ebc.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert caught.value.exit_code == 3
    return message


def test_the_good_batch_is_good() -> None:
    for compression in METHODS:
        assert collection(compression)(batch()).values().shape == (3, 12)


@every_method
@pytest.mark.parametrize("bad", [10, 11, 2**31, 2**62, -1, -10, INT64_MIN])
def test_f8_id_without_a_row(compression: Compression, bad: int) -> None:
    values = torch.tensor([1, bad, 3, 4, 5, 6, 7, 8, 9])
    refused(
        collection(compression),
        batch(values=values),
        "table 'users'",
        "feature 'u'",
        "sample 0",
        "position 1",
        rf"id {bad} ",
        r"\[0, 10\)",
    )


@every_method
def test_f8_the_limit_is_the_features_own_table(compression: Compression) -> None:
    """Id 10 is one too many for users and fine for goods, whatever rows the storage has to spare."""
    collection(compression)(batch(values=torch.tensor([1, 2, 3, 10, 19, 6, 7, 8, 9])))
    values = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 20])
    refused(
        collection(compression),
        batch(values=values),
        "table 'goods'",
        "feature 'j'",
        "sample 1",
        "position 2",
        "id 20 ",
        r"1 bad ids",
    )


@every_method
def test_f8_keys_in_another_order_name_the_right_feature(compression: Compression) -> None:
    kjt = batch(values=torch.tensor([1, 2, 3, 4, -5, 6, 7, 8, 9])).permute([2, 1, 0])
    refused(collection(compression), kjt, "feature 'i'", "table 'goods'", "sample 1", "position 0", "id -5 ")


def test_f8_int32_ids_are_checked_too() -> None:
    values = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 20], dtype=torch.int32)
    refused(collection(recemb.Dense()), batch(values=values), "id 20 ")


@every_method
def test_f8_weights_are_untouched_after_training_steps_around_the_error(compression: Compression) -> None:
    ebc = collection(compression)
    optimizer = torch.optim.SGD(ebc.parameters(), 0.1)
    ebc(batch()).values().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    refused(ebc, batch(values=torch.full((9,), 10)), r"feature 'u'", "3 bad ids|9 bad ids")
    ebc(batch()).values().sum().backward()


def test_f10_a_duplicate_key() -> None:
    refused(collection(recemb.Dense()), batch(keys=["u", "i", "u"]), "key 'u' more than once", "unique")


def test_f10_a_missing_key() -> None:
    kjt = batch(keys=["u", "i", "other"])
    refused(
        collection(recemb.Dense()), kjt, "feature 'j'", "table 'goods'", "missing", r"\['u', 'i', 'other'\]"
    )


def test_f10_an_extra_key_is_ignored_whatever_its_ids() -> None:
    ebc = collection(recemb.TensorTrain(rank=2))
    wider = KeyedJaggedTensor(
        keys=["x", "u", "i", "j"],
        values=torch.tensor([-7, 2**40, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        lengths=torch.tensor([1, 1, 0, 2, 0, 1, 1, 1, 1, 0, 3, 0]),
    )
    assert torch.equal(ebc(wider).values(), ebc(batch()).values())


@every_method
@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        ([2, 0, 1, 1, 1, 1, 0, 2, 0], "offsets run from 0 to 8 but there are 9 ids"),
        ([2, 0, 1, 1, 1, 1, 0, 4, 0], "offsets run from 0 to 10 but there are 9 ids"),
        ([2, 0, 1, 2, -1, 2, 0, 3, 0], "feature 'i'.*sample 1 has length -1"),
        ([3, 0, 1, 1, 1, 1, 0, 3, -1], "feature 'j'.*sample 2 has length -1"),
    ],
    ids=["sum-too-small", "sum-too-large", "negative-inside", "negative-last"],
)
def test_f11_lengths(compression: Compression, lengths: list[int], reason: str) -> None:
    refused(collection(compression), batch(lengths=torch.tensor(lengths)), reason)


@pytest.mark.parametrize(
    ("offsets", "reason"),
    [
        ([0, 2, 1, 3, 4, 5, 6, 6, 9, 9], "feature 'u'.*sample 1 has length -1.*must not fall"),
        ([1, 2, 2, 3, 4, 5, 6, 6, 9, 9], "offsets run from 1 to 9"),
        ([0, 2, 2, 3, 4, 5, 6, 6, 9, 8], "feature 'j'.*sample 2 has length -1"),
        ([0, 2, 2, 3, 4, 5, 6, 6, 9, 12], "offsets run from 0 to 12 but there are 9 ids"),
    ],
    ids=["falling", "late-start", "falling-last", "beyond-the-ids"],
)
def test_f11_offsets(offsets: list[int], reason: str) -> None:
    refused(collection(recemb.Dense()), batch(lengths=None, offsets=torch.tensor(offsets)), reason)


@pytest.mark.parametrize("count", [7, 8, 10, 11])
def test_f11_a_number_of_lengths_that_is_no_multiple_of_the_keys(count: int) -> None:
    lengths = torch.zeros(count, dtype=torch.int64)
    lengths[0] = 9
    with pytest.raises((BatchError, ValueError, AssertionError)):
        collection(recemb.Dense())(batch(lengths=lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.int16, torch.uint8])
def test_f11_values_that_are_no_ids(dtype: torch.dtype) -> None:
    values = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9]).to(dtype)
    refused(collection(recemb.Dense()), batch(values=values), re.escape(str(dtype)), "int64")


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]], ids=["in-order", "reordered"])
@pytest.mark.parametrize("size", [0, 8, 10, 18])
def test_f11_weights_of_the_wrong_size(order: list[int], size: int) -> None:
    names = ["u", "i", "j"]
    kjt = KeyedJaggedTensor(
        keys=[names[k] for k in order],
        values=torch.arange(1, 10),
        lengths=torch.tensor([1] * 9),
        weights=torch.ones(size),
    )
    refused(collection(recemb.Dense(), is_weighted=True), kjt, rf"weights have shape \({size},\)", r"\(9\)")


def test_f11_weights_of_two_dimensions() -> None:
    refused(
        collection(recemb.Dense(), is_weighted=True), batch(weights=torch.ones(9, 1)), r"weights.*\(9, 1\)"
    )


def test_f11_missing_weights() -> None:
    refused(collection(recemb.Dense(), is_weighted=True), batch(), "is_weighted=True.*has no weights")


def test_f11_integer_weights() -> None:
    kjt = batch(weights=torch.ones(9, dtype=torch.int64))
    refused(collection(recemb.Dense(), is_weighted=True), kjt, "int64.*floating point")


@every_method
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_f12_non_finite_weights(compression: Compression, bad: float) -> None:
    weights = torch.ones(9)
    weights[7] = bad
    refused(
        collection(compression, is_weighted=True),
        batch(weights=weights),
        "feature 'j'",
        "table 'goods'",
        "sample 1",
        "position 1",
        f"weight {bad} is not finite",
    )


def test_f12_weights_are_ignored_when_the_collection_is_not_weighted() -> None:
    ebc = collection(recemb.Dense())
    kjt = batch(weights=torch.full((9,), math.nan))
    assert torch.equal(ebc(kjt).values(), ebc(batch()).values())
