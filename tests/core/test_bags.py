"""``Bags``: its views, and its checks without torchrec in between."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.bags import Bags, LookupTarget, check_bags
from recemb.errors import BatchError


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[list[int]]], Bags]:
    """[feature][sample] -> ids, and the same as Bags whose weights are the ids' positions."""
    features, size = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    nested = [[draw(st.lists(st.integers(0, 99), max_size=3)) for _ in range(size)] for _ in range(features)]
    flat = [i for feature in nested for bag in feature for i in bag]
    offsets = [0]
    for feature in nested:
        for bag in feature:
            offsets.append(offsets[-1] + len(bag))
    bags = Bags(
        torch.tensor(flat, dtype=torch.int64),
        torch.tensor(offsets),
        features,
        torch.arange(len(flat), dtype=torch.float32),
    )
    return nested, bags


def nest(bags: Bags) -> list[list[list[int]]]:
    """Back to [feature][sample] -> ids."""
    offsets, size = bags.offsets.tolist(), bags.batch_size
    assert offsets[0] == 0
    assert offsets[-1] == bags.ids.numel()
    ids = bags.ids.tolist()
    return [
        [ids[offsets[f * size + b] : offsets[f * size + b + 1]] for b in range(size)]
        for f in range(bags.num_features)
    ]


@given(batches(), st.data())
@settings(derandomize=True, deadline=None, max_examples=150)
def test_select_takes_any_features_in_any_order(
    batch: tuple[list[list[list[int]]], Bags], data: st.DataObject
) -> None:
    nested, bags = batch
    chosen = data.draw(st.lists(st.integers(0, len(nested) - 1), min_size=1, max_size=6))
    selected = bags.select(chosen)
    assert nest(selected) == [nested[f] for f in chosen]
    assert selected.batch_size == bags.batch_size
    assert selected.lengths().tolist() == [len(bag) for f in chosen for bag in nested[f]]
    # A weight is its id's place in the whole batch, so weights have moved with their ids.
    assert selected.weights is not None
    assert bags.ids[selected.weights.long()].tolist() == selected.ids.tolist()
    for f in range(len(nested)):
        assert nest(bags.feature(f)) == [nested[f]]


@given(batches())
@settings(derandomize=True, deadline=None, max_examples=50)
def test_feature_bounds(batch: tuple[list[list[list[int]]], Bags]) -> None:
    nested, bags = batch
    counts = [sum(map(len, feature)) for feature in nested]
    assert bags.feature_bounds == [sum(counts[:f]) for f in range(len(counts) + 1)]
    check_bags(bags, [LookupTarget(f"f{f}", "t", 100) for f in range(len(nested))])


def test_neighbours_are_selected_without_a_copy() -> None:
    bags = Bags(torch.arange(12), torch.arange(13), 4)
    assert bags.select([0, 1, 2, 3]) is bags
    middle = bags.select([1, 2])
    assert middle.ids.data_ptr() == bags.ids[3:].data_ptr()
    assert middle.ids.tolist() == list(range(3, 9))


@given(batches(), st.data())
@settings(derandomize=True, deadline=None, max_examples=100)
def test_f8_the_first_bad_id_is_located(
    batch: tuple[list[list[list[int]]], Bags], data: st.DataObject
) -> None:
    nested, bags = batch
    if not bags.ids.numel():
        return
    at = data.draw(st.integers(0, bags.ids.numel() - 1))
    bad = data.draw(st.sampled_from([-1, 100, 2**62, -(2**63)]))
    ids = bags.ids.clone()
    ids[at] = bad
    places = [
        (f, b, p)
        for f, feature in enumerate(nested)
        for b, bag in enumerate(feature)
        for p in range(len(bag))
    ]
    f, b, p = places[at]
    targets = [LookupTarget(f"f{k}", f"t{k}", 100) for k in range(len(nested))]
    with pytest.raises(BatchError) as caught:
        check_bags(Bags(ids, bags.offsets, bags.num_features), targets)
    assert str(caught.value).startswith(
        f"feature 'f{f}' (table 't{f}'), sample {b}, position {p} of its bag: id {bad} is outside [0, 100)"
    )


@pytest.mark.parametrize(
    ("bags", "reason"),
    [
        (Bags(torch.zeros(2), torch.tensor([0, 2]), 1), "int64 tensor, got torch.float32"),
        (Bags(torch.zeros(2, dtype=torch.int32), torch.tensor([0, 2]), 1), "got torch.int32"),
        (Bags(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0, 2]), 1), r"shape \(2, 1\)"),
        (
            Bags(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1, 2]), 2),
            "2 features, the tables expect 1",
        ),
    ],
    ids=["float", "int32", "2-d", "features"],
)
def test_f11_malformed(bags: Bags, reason: str) -> None:
    with pytest.raises(BatchError, match=reason):
        check_bags(bags, [LookupTarget("f", "t", 10)])


def test_f11_offsets_that_do_not_divide_into_features() -> None:
    bags = Bags(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 2, 3]), 2)
    with pytest.raises(BatchError, match=r"4 entries.*2 features"):
        check_bags(bags, [LookupTarget("f", "t", 10), LookupTarget("g", "t", 10)])


def test_a_batch_beyond_32_bits_is_refused() -> None:
    # A stride of 0: 2**31 ids that take no memory.
    ids = torch.zeros(1, dtype=torch.int64).expand(2**31)
    with pytest.raises(BatchError, match="split the batch"):
        check_bags(Bags(ids, torch.tensor([0, 2**31]), 1), [LookupTarget("f", "t", 10)])
