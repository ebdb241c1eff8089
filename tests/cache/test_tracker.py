"""The counters of ids outside the cache, against plain Python."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recemb.cache.tracker import buckets_of, cells_of, see, vote
from recemb.data.zipf import BoundedZipf

BATCHES = st.lists(st.lists(st.integers(-1, 19), max_size=8), max_size=6)


def empty(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((size + 1,), -1), torch.zeros(size + 1)


@given(batches=BATCHES)
def test_with_a_bucket_for_every_id_votes_are_counts(batches: list[list[int]]) -> None:
    owners, votes = empty(20)
    counts: Counter[int] = Counter()
    for batch in batches:
        ids = torch.tensor(batch, dtype=torch.int64)
        vote(owners, votes, buckets_of(ids, 20, 20), ids, 2.0 * (ids >= 0))
        counts.update({i: 2 * batch.count(i) for i in set(batch) if i >= 0})
    assert votes[:20].tolist() == [counts[i] for i in range(20)]
    assert owners[:20].tolist() == [i if counts[i] else -1 for i in range(20)]
    assert int(owners[20]) == -1
    assert float(votes[20]) == 0


@given(batches=BATCHES)
def test_one_bucket_is_a_majority_vote_of_whole_batches(batches: list[list[int]]) -> None:
    owners, votes = empty(1)
    owner, score = -1, 0.0
    for batch in batches:
        ids = torch.tensor(batch, dtype=torch.int64)
        vote(owners, votes, torch.where(ids < 0, 1, 0), ids, (ids >= 0).float())
        seen = [i for i in batch if i >= 0]
        score += sum(1 if i == owner else -1 for i in seen)
        if score < 0:
            # Twenty ids have cells of their own.
            heirs = Counter(i for i in seen if i != owner)
            owner = min((-count, i) for i, count in heirs.items())[1]
            score = min(-score, batch.count(owner))
        assert int(owners[0]) == owner
        assert float(votes[0]) == score


def test_twenty_ids_have_cells_of_their_own() -> None:
    assert len(set(cells_of(torch.arange(20)).tolist())) == 20


@given(batches=BATCHES)
def test_positions_without_an_id_change_nothing(batches: list[list[int]]) -> None:
    """A GPU's streams hold them, compacted ones do not."""
    for count in (vote, see):
        both = [empty(4), empty(4)]
        for step, batch in enumerate(batches):
            for (owners, votes), ids in zip(both, (batch, [i for i in batch if i >= 0]), strict=True):
                given = torch.tensor(ids, dtype=torch.int64)
                weights = (given >= 0).float()
                extra = weights if count is vote else step
                count(owners, votes, buckets_of(given, 4, 20), given, extra)
        assert torch.equal(both[0][0][:4], both[1][0][:4])
        assert torch.equal(both[0][1][:4], both[1][1][:4])


def test_the_heaviest_takes_a_bucket_over_and_keeps_it_while_it_is_the_majority() -> None:
    owners, votes = empty(1)
    for heavy in (9999, 1, 5000):
        for _ in range(3):
            rest = torch.arange(2000, 2000 + 300)
            ids = torch.cat([rest, torch.full((400,), heavy)])
            vote(owners, votes, torch.zeros_like(ids), ids, torch.ones(len(ids)))
        assert int(owners[0]) == heavy
        assert 0 < float(votes[0]) <= 3 * 400


@given(batches=BATCHES)
def test_seen_last(batches: list[list[int]]) -> None:
    owners, votes = empty(4)
    expected: dict[int, tuple[int, float]] = {}
    for step, batch in enumerate(batches):
        ids = torch.tensor(batch, dtype=torch.int64)
        buckets = buckets_of(ids, 4, 20)
        see(owners, votes, buckets, ids, step)
        seen = [(i, bucket) for i, bucket in zip(batch, buckets.tolist(), strict=True) if i >= 0]
        for place, (i, bucket) in enumerate(seen, 1):
            expected[bucket] = i, step + place / (len(seen) + 1)
    for bucket in range(4):
        owner, time = expected.get(bucket, (-1, 0))
        assert int(owners[bucket]) == owner
        assert abs(float(votes[bucket]) - time) < 1e-6


def test_a_later_step_takes_over_however_coarse_its_places_are() -> None:
    """float32 cannot tell this step from the one before."""
    owners, votes = empty(1)
    nobody = torch.zeros(1, dtype=torch.int64)
    for ids, step in ((3, 2**24), (5, 2**24 + 1), (4, 2**24 + 2)):
        see(owners, votes, nobody, torch.tensor([ids]), step)
        assert int(owners[0]) == ids


class _LargeResults(TorchDispatchMode):
    """Notes operations that make as many numbers as there are counters."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(tensor) for tensor in tree_leaves((args, kwargs))}
        for made in tree_leaves(out):
            # Memory that is only reached where it is needed costs nothing.
            empty = "empty" in func.__name__
            if isinstance(made, Tensor) and made.numel() > self.most and id(made) not in given and not empty:
                self.found.append(func.__name__)
        return out


@pytest.mark.parametrize("count", ["vote", "see"])
def test_a_batch_costs_what_it_holds(count: str) -> None:
    """Whatever the number of counters, which grows with the cache: a batch of 64 may meet a million."""
    owners, votes = empty(10**6)
    owners[-1] = -5  # the spare bucket's is not an id
    ids = torch.arange(64) * 997
    buckets = buckets_of(ids, 10**6, 10**8)
    with _LargeResults(10**5) as seen:
        if count == "vote":
            vote(owners, votes, buckets, ids, torch.ones(64))
        else:
            see(owners, votes, buckets, ids, 7)
    assert seen.found == []
    assert int(owners[-1]) == -5
    assert torch.equal(owners[buckets], ids)


def test_buckets_are_even_and_no_id_has_the_spare_one() -> None:
    ids = torch.arange(100_000)
    buckets = buckets_of(ids, 1000, 2**40)
    assert int(buckets.min()) == 0
    assert int(buckets.max()) == 999
    loads = torch.bincount(buckets, minlength=1000).double()
    # 100 a bucket; a Poisson load strays by 10.
    assert float(loads.std()) < 13
    large = ids + 2**39
    assert int(buckets_of(large, 1000, 2**40).min()) >= 0
    assert buckets_of(torch.tensor([-1]), 1000, 2**40).tolist() == [1000]


@pytest.mark.parametrize("batch_size", [2000, 20_000])
@pytest.mark.parametrize("order", ["hottest first", "permuted", "hottest last"])
def test_the_hot_ids_of_a_zipf_stream_own_their_buckets(order: str, batch_size: int) -> None:
    rows, watched = 100_000, 2000
    generator = np.random.default_rng(0)
    ranks = {
        "hottest first": np.arange(rows),
        "permuted": np.random.default_rng(1).permutation(rows),
        "hottest last": np.arange(rows)[::-1].copy(),
    }[order]
    owners, votes = empty(watched)
    for _ in range(400_000 // batch_size):
        drawn = ranks[BoundedZipf(rows, 1.05).sample(generator, batch_size) - 1]
        ids = torch.from_numpy(drawn)
        vote(owners, votes, buckets_of(ids, watched, rows), ids, torch.ones(len(ids)))
    found = set(owners.tolist())
    assert sum(int(i) in found for i in ranks[:100]) >= 97
    assert sum(int(i) in found for i in ranks[:1000]) >= 640
    # A vote never exceeds what its id was seen: the hottest come first.
    best = set(owners[:-1][votes[:-1].argsort(descending=True)[:20]].tolist())
    assert best <= {int(i) for i in ranks[:60]}
