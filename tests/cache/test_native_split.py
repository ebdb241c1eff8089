"""The native split of a batch, and the counting of its ids, against the torch code that runs without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.cache.hot_rows import HotRowCache
from recemb.cache.merge import Merge
from recemb.cache.streams import Split, Streams
from recemb.spec import ROBE, Dense, HotRows, Pooling, QuotientRemainder, TableSpec
from recemb_kernels import native
from recemb_kernels.build import compiler
from recemb_kernels.cache_split import Counters, Splitter, count, library
from tests.cache.cases import METHODS, Collection, spec

pytestmark = pytest.mark.skipif(not compiler(), reason="needs a C++ compiler")

ROWS = 30


def in_torch(call: Callable[[], Any]) -> Any:
    """The result where no compiler is."""
    with patch.object(native, "_unavailable", {"cache_split": "no compiler in this test"}):
        return call()


def collection(features: list[list[str]], cached: list[list[int] | None]) -> Collection:
    """Tables with these features each and these cached ids, ``None`` without a cache."""
    tables: list[TableSpec] = []
    for t, (names, ids) in enumerate(zip(features, cached, strict=True)):
        cache = HotRows(rows=ROWS // 2, warmup=10**9)
        method = Dense() if ids is None else QuotientRemainder(collisions=6, cache=cache)
        tables.append(spec(method, ROWS, 4, name=f"t{t}", features=names))
    made = Collection(tables)
    for t, ids in enumerate(cached):
        if ids:
            # Not in the order of the ids, with free slots between them.
            made.cache(f"t{t}").ids[torch.arange(len(ids)).flip(0)] = torch.tensor(ids)
    return made


def backends(made: Collection) -> list[Backend]:
    return [made.backend(target.table) for target in made.engine.targets]


def streams_of(made: Collection) -> Streams:
    return Streams([made.backend(target.table).table for target in made.engine.targets])


def assert_same(ours: Split, theirs: Split) -> None:
    assert torch.equal(ours.bags.ids, theirs.bags.ids)
    assert torch.equal(ours.bags.offsets, theirs.bags.offsets)
    assert (ours.bags.weights is None) == (theirs.bags.weights is None)
    if ours.bags.weights is not None and theirs.bags.weights is not None:
        assert ours.bags.weights.dtype == theirs.bags.weights.dtype
        assert torch.equal(ours.bags.weights, theirs.bags.weights)
    assert (ours.hot_bounds, ours.cold_bounds) == (theirs.hot_bounds, theirs.cold_bounds)
    assert ours.bags.num_features == theirs.bags.num_features
    assert ours.bags.feature_bounds == Bags.feature_bounds.func(ours.bags)  # type: ignore[attr-defined]


def both(made: Collection, bags: Bags) -> tuple[Split, Split]:
    ours, theirs = streams_of(made), streams_of(made)
    found = ours.split(backends(made), bags)
    assert isinstance(ours._splitter and ours._splitter[1], Splitter)
    return found, in_torch(lambda: theirs.split(backends(made), bags))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Collection, Bags]:
    held = st.lists(st.integers(0, ROWS - 1), unique=True, max_size=ROWS // 2)
    cached = draw(
        st.lists(st.none() | held, min_size=1, max_size=4).filter(lambda c: any(x is not None for x in c))
    )
    features = [[f"f{t}_{k}" for k in range(draw(st.integers(1, 3)))] for t in range(len(cached))]
    size = draw(st.integers(0, 4))
    lengths = draw(
        st.lists(
            st.integers(0, 3),
            min_size=size * sum(map(len, features)),
            max_size=size * sum(map(len, features)),
        )
    )
    total = sum(lengths)
    ids = draw(st.lists(st.integers(0, ROWS - 1), min_size=total, max_size=total))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    weights = draw(st.sampled_from([None, torch.float32, torch.float64]))
    return collection(features, cached), Bags(
        torch.tensor(ids, dtype=torch.int64),
        offsets,
        sum(map(len, features)),
        None if weights is None else torch.arange(1, total + 1).to(weights),
    )


@given(case=cases())
def test_the_same_as_in_torch(case: tuple[Collection, Bags]) -> None:
    assert_same(*both(*case))


@pytest.mark.parametrize("size", [16_384, 20_001])
@pytest.mark.parametrize("kind", ["mixed", "all hits", "no hits", "one bag holds all"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_by_several_threads(size: int, kind: str, weighted: bool, set_threads: Callable[[int], None]) -> None:
    torch.manual_seed(0)
    made = collection([["a"], ["b", "c"], ["d"]], [list(range(15)), None, list(range(5, 20))])
    low, high = {"all hits": (5, 15), "no hits": (20, ROWS)}.get(kind, (0, ROWS))
    lengths = torch.randint(0, 4, (4 * size // 6,))
    if kind == "one bag holds all":
        lengths = torch.zeros(4 * size // 6, dtype=torch.int64)
        lengths[7] = size
    lengths = lengths[: lengths.numel() // 4 * 4]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    ids = torch.randint(low, high, (total,))
    bags = Bags(ids, offsets, 4, torch.rand(total) if weighted else None)
    set_threads(3)
    assert_same(*both(made, bags))


def test_gradients_of_weights_go_back_to_their_places() -> None:
    made = collection([["a"], ["b"]], [[3, 1], None])
    bags = Bags(
        torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2, 3, 4, 5]), 2, torch.ones(5).requires_grad_()
    )
    split, _ = both(made, bags)
    assert split.bags.weights is not None
    (grad,) = torch.autograd.grad((split.bags.weights * torch.arange(5.0)).sum(), [bags.weights])
    assert grad.tolist() == [0, 4, 1, 2, 3]


def test_other_rows_take_another_table() -> None:
    made = collection([["a"]], [[3]])
    streams, bags = streams_of(made), Bags(torch.tensor([3, 4]), torch.arange(3), 1)
    assert streams.split(backends(made), bags).bags.ids.tolist() == [0, 4]
    made.cache("t0").ids[1] = 4
    assert streams.split(backends(made), bags).bags.ids.tolist() == [0, 1]


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[list[int], list[int], int | None]]:
    slots, ids = st.lists(st.integers(-1, 9), max_size=12), st.lists(st.integers(-1, 99), max_size=12)
    return draw(st.lists(st.tuples(slots, ids, st.none() | st.integers(0, 2**31)), max_size=5))


@pytest.mark.parametrize("rows", [20, 300], ids=["few buckets", "more"])
@given(batches=batches())
def test_counts_are_those_of_torch(rows: int, batches: list[tuple[list[int], list[int], int | None]]) -> None:
    cache = HotRows(rows=10, policy="importance")
    caches = [
        HotRowCache(spec(QuotientRemainder(collisions=6, cache=cache), max(100, rows)), torch.device("cpu"))
        for _ in range(2)
    ]
    for slots, ids, seed in batches:
        weights: tuple[Tensor, Tensor] | None = None
        if seed is not None:
            make = torch.Generator().manual_seed(seed)
            weights = torch.rand(len(slots), generator=make), torch.rand(len(ids), generator=make)
            weights[1][torch.tensor(ids, dtype=torch.int64) < 0] = 0
        hit, missed = torch.tensor(slots, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64)
        caches[0].observe(hit, missed, weights)
        in_torch(lambda hit=hit, missed=missed, weights=weights: caches[1].observe(hit, missed, weights))
        for name in ("scores", "owners", "votes"):
            assert torch.equal(getattr(caches[0], name), getattr(caches[1], name)), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_other_types_are_not_read_by_pointer(dtype: torch.dtype) -> None:
    whole = torch.arange(4)
    of_other = whole.to(dtype)
    assert Splitter.of(of_other, whole, [0]) is None
    assert Splitter.of(whole, of_other, [0]) is None
    splitter = Splitter(library(), whole, whole, [0])
    for ids, offsets in ((of_other, whole), (whole, of_other)):
        with pytest.raises(TypeError, match="must be int64"):
            splitter(ids, offsets, 3, want_order=False)
    for k in range(3):
        owners, slots, misses = (of_other if j == k else whole for j in range(3))
        counters = Counters(torch.zeros(4), owners, torch.zeros(4), 100)
        assert not count(counters, slots, misses)
        assert not bool(counters.scores.any() or counters.votes.any())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_kernels_add_streams_up_as_torch_does(
    method: Callable[[HotRows], Any], pooling: Pooling, weighted: bool
) -> None:
    """Bags of ids that are all cached, of some and of none, of a table with two features too."""
    cache = HotRows(rows=ROWS // 2, warmup=10**9)
    tables = [
        spec(Dense(), ROWS, name="plain", features=["p"], pooling=pooling),
        spec(method(cache), ROWS, name="cached", features=["a", "b"], pooling=pooling),
        spec(method(cache), ROWS, name="also", features=["c"], pooling=pooling),
        spec(Dense(), ROWS, name="last", features=["z"], pooling=pooling),
    ]
    ids = [3, 4, 12, 20, 5, 25, 7, 8, 21, 0, 29, 9, 28, 2, 11]
    offsets = torch.tensor([0, 0, 2, 3, 5, 8, 8, 9, 10, 11, 13, 14, 15, 15, 15, 15])
    results = []
    for joined in (True, False):
        torch.manual_seed(0)
        made = Collection(tables)
        for name in ("cached", "also"):
            made.cache(name).ids[:10] = torch.arange(10)
            torch.nn.init.normal_(made.cache(name).weight)
        apply_optimizer_in_backward(torch.optim.SGD, made.parameters(), {"lr": 0.1})
        weights = torch.linspace(-1, 2, len(ids), requires_grad=True) if weighted else None
        refuse = patch.object(Merge, "apply", side_effect=AssertionError) if joined else nullcontext()
        with refuse, nullcontext() if joined else patch.object(Streams, "joins", ()):
            out = made(Bags(torch.tensor(ids), offsets, 5, weights))
            out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        results.append([out, *made.parameters(), *([] if weights is None else [weights.grad])])
    for ours, theirs in zip(*results, strict=True):
        if pooling == "sum":
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_array_that_also_serves_an_uncached_table_is_added_after_the_cache(
    threads: int, set_threads: Callable[[int], None]
) -> None:
    """Its kernel is the first of the call's and has to run last, when all threads are done with the cache's.

    Two threads share two features of the array, so that the second one adds to samples whose cached rows,
    many in each, the first one has still to pool: unless it waits, they are written over what it has added.
    """
    cache, size, hits = HotRows(rows=ROWS // 2, warmup=10**9), 1024, 200
    tables = [
        spec(ROBE(compress_rate=4, block_size=8), ROWS, name="plain", features=["p"]),
        spec(ROBE(compress_rate=4, block_size=8, cache=cache), ROWS, name="cached", features=["a"]),
    ]
    torch.manual_seed(0)
    made = Collection(tables)
    made.cache("cached").ids[:10] = torch.arange(10)
    torch.nn.init.normal_(made.cache("cached").weight)
    # One id that is not cached a sample, after many that are in the first half of the samples.
    lengths = torch.ones(2, size, dtype=torch.int64)
    lengths[1, : size // 2] += hits
    ids = torch.arange(int(lengths.sum())) % 10
    ids[lengths.flatten().cumsum(0) - 1] = torch.arange(2 * size) % 20 + 10
    bags = Bags(ids, torch.cat([lengths.new_zeros(1), lengths.flatten().cumsum(0)]), 2)
    set_threads(threads)
    with torch.no_grad():
        with patch.object(Streams, "joins", ()):
            expected = made(bags)
        with patch.object(Merge, "apply", side_effect=AssertionError):
            for _ in range(10):
                assert torch.equal(made(bags), expected)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_a_step_is_the_same_as_in_torch(pooling: Pooling) -> None:
    outcomes = []
    for native_ in (True, False):
        torch.manual_seed(0)
        cache = HotRows(rows=6, warmup=2, refresh_every=2, track_every=1, policy="importance")
        names = [("a", "b"), ("c",), ("d",)]
        methods = [
            QuotientRemainder(collisions=6, cache=cache),
            Dense(),
            QuotientRemainder(collisions=6, cache=cache),
        ]
        made = Collection(
            [
                spec(method, ROWS, 4, name=f"t{t}", features=own, pooling=pooling)
                for t, (method, own) in enumerate(zip(methods, names, strict=True))
            ]
        )
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)

        def steps(made: Collection = made, optimizer: torch.optim.Optimizer = optimizer) -> None:
            for _ in range(6):
                lengths = torch.randint(0, 3, (4 * 7,))
                offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
                ids = torch.randint(0, ROWS, (int(offsets[-1]),)) ** 2 // ROWS
                optimizer.zero_grad()
                made(Bags(ids, offsets, 4)).square().sum().backward()
                optimizer.step()

        if native_:
            steps()
        else:
            in_torch(steps)
        assert made.cache("t0").metrics().promotions
        outcomes.append(made.state_dict())
    for name, ours in outcomes[0].items():
        assert torch.equal(ours, outcomes[1][name]), name
