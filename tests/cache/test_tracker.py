"""The counters of ids outside the cache, against plain Python."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from recemb.cache.tracker import buckets_of, see, vote
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
            owner, score = min(i for i in seen if i != owner), -score
        assert int(owners[0]) == owner
        assert float(votes[0]) == score


@given(batches=BATCHES)
def test_seen_last(batches: list[list[int]]) -> None:
    owners, votes = empty(4)
    expected: dict[int, tuple[int, int]] = {}
    for step, batch in enumerate(batches):
        ids = torch.tensor(batch, dtype=torch.int64)
        buckets = buckets_of(ids, 4, 20)
        see(owners, votes, buckets, ids, step)
        for bucket in set(buckets.tolist()) - {4}:
            expected[bucket] = (
                min(i for i, b in zip(batch, buckets.tolist(), strict=True) if b == bucket),
                step,
            )
    for bucket in range(4):
        assert (int(owners[bucket]), int(votes[bucket])) == expected.get(bucket, (-1, 0))


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


def test_the_hot_ids_of_a_zipf_stream_own_their_buckets() -> None:
    import numpy as np

    rows, watched = 100_000, 2000
    generator = np.random.default_rng(0)
    owners, votes = empty(watched)
    for _ in range(200):
        drawn = BoundedZipf(rows, 1.05).sample(generator, 2000) - 1
        ids = torch.from_numpy(drawn)
        vote(owners, votes, buckets_of(ids, watched, rows), ids, torch.ones(len(ids)))
    found = set(owners.tolist())
    assert sum(i in found for i in range(100)) >= 97
    assert sum(i in found for i in range(1000)) >= 640
    # A vote never exceeds what its id was seen: the hottest come first.
    best = owners[:-1][votes[:-1].argsort(descending=True)[:20]]
    assert int(best.max()) < 60
