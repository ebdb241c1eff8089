"""Which rows are exchanged: how much hotter one outside has to be, and when a cache is first filled."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from recemb.cache.hot_rows import Exchange, HotRowCache
from recemb.spec import HotRows, TensorTrain
from tests.cache.cases import Collection, hold, one_id_bags, spec


def cache_of_two(policy: Any = "lfu", **settings: Any) -> Collection:
    torch.manual_seed(0)
    hot = HotRows(rows=2, policy=policy, **{"track_every": 1} | settings)
    return Collection([spec(TensorTrain(rank=4, cache=hot), 40)])


@pytest.mark.parametrize(
    ("policy", "score", "held"),
    [
        ("lfu", 20.0, {1, 2}),
        ("lfu", 20.5, {2, 7}),
        ("importance", 20.0, {1, 2}),
        ("importance", 20.5, {2, 7}),
        ("lru", 10.0, {1, 2}),
        ("lru", 10.5, {2, 7}),
    ],
)
def test_a_row_gives_way_to_one_more_than_twice_as_hot(policy: str, score: float, held: set[int]) -> None:
    """Of ``lru``, to one that has been looked up later."""
    collection = cache_of_two(policy, warmup=10**9)
    cache = hold(collection, [1, 2])
    with torch.no_grad():
        cache.scores[:] = torch.tensor([10.0, 30.0])
        cache.owners[7], cache.votes[7] = 7, score
    exchange = cache.choose()
    left = {1, 2} - {int(cache.ids[slot]) for slot in exchange.leaving}
    assert left | set(exchange.ids.tolist()) == held


def test_no_row_is_exchanged_for_equals() -> None:
    """Forty rows, each looked up as often as another but for chance; the cache keeps what it has."""
    collection = cache_of_two(warmup=8, refresh_every=8, decay=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        ids = torch.randint(0, 40, (400,), generator=generator).tolist()
        collection(one_id_bags(ids)).sum().backward()
        collection.zero_grad()
    figures = collection.cache().metrics()
    assert figures.cached_rows == 2
    assert figures.evictions == 0


@pytest.mark.parametrize("empty", [0, 2])
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("policy", ["lfu", "lru", "importance"])
def test_a_cache_is_filled_once_ids_have_been_counted(policy: str, warmup: int, empty: int) -> None:
    """It would be empty until the next exchange, had it been filled by no counts."""
    collection = cache_of_two(policy, warmup=warmup, refresh_every=1000)
    cache = collection.cache()
    held = []
    for ids in [*([],) * empty, *([4, 4, 9],) * 3]:
        collection(one_id_bags(ids)).sum().backward()
        collection.zero_grad()
        held.append({i for i in cache.ids.tolist() if i >= 0})
    assert held == [*(set(),) * (empty + 1), {4, 9}, {4, 9}]
    assert cache.metrics().hit_rate == 1
    assert cache.metrics().lookups == 6


@pytest.mark.parametrize("late", [5, 100, 1000])
def test_a_table_that_no_id_is_looked_up_in_is_rarely_tried(
    late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as ids are counted at first, later when it has lasted a 16th longer; then it is filled."""
    collection = cache_of_two(warmup=1, refresh_every=1000, track_every=4)
    cache, tried, choose = collection.cache(), [], HotRowCache.choose

    def counted(self: HotRowCache) -> Exchange:
        tried.append(self.host_value("steps"))
        return choose(self)

    monkeypatch.setattr(HotRowCache, "choose", counted)
    for ids in [*([],) * late, *([4, 9],) * (4 + max(4, late // 16))]:
        collection(one_id_bags(ids)).sum().backward()
        collection.zero_grad()
    assert {i for i in cache.ids.tolist() if i >= 0} == {4, 9}
    waits = [after - before for before, after in itertools.pairwise(tried)]
    assert all(wait == max(4, (at - 1) // 16) for at, wait in zip(tried, waits, strict=False))
    assert tried[0] == 1
    assert len(tried) <= 18 + 20 * math.log(1 + late / 64)
