"""A look-up with some rows cached equals one in the effective table, values and gradients."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from recemb.bags import Bags
from recemb.cache.hot_rows import HotRowCache
from recemb.spec import ROBE, Dense, Pooling, TableSpec, TensorTrain
from tests.backends.cases import bags_of, gradients, make_bags
from tests.cache.cases import METHODS, Collection, forever, hold, spec


def disturb(cache: HotRowCache) -> None:
    """Cached rows that differ from their compressed values; an empty slot is never read."""
    with torch.no_grad():
        cache.weight += torch.randn(cache.weight.shape, dtype=cache.weight.dtype)
        cache.weight[cache.ids < 0] = float("nan")


def plain_twin(collection: Collection, bags: Bags) -> Tensor:
    """The look-up in the effective tables, by torch.nn.functional.embedding_bag."""
    columns = []
    for f, target in enumerate(collection.engine.targets):
        backend = collection.backend(target.table)
        ids = torch.arange(backend.table.num_embeddings)
        rows = backend.rows(backend.map_ids(ids))
        if backend.cache is not None:
            slots = (backend.cache.ids >= 0).nonzero().flatten()
            rows = rows.index_copy(0, backend.cache.ids[slots], backend.cache.weight[slots])
        own = bags.feature(f)
        columns.append(
            torch.nn.functional.embedding_bag(
                own.ids,
                rows,
                own.offsets,
                mode=backend.table.pooling,
                per_sample_weights=own.weights,
                include_last_offset=True,
            )
        )
    return torch.cat(columns, dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["plain-torch", "kernels"])
@pytest.mark.parametrize("pooling", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients(method: str, pooling: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kind: Pooling = "mean" if pooling == "mean" else "sum"
    cache = forever(rows=7)
    tables = [
        spec(METHODS[method](cache), 60, 8, name="t", features=("f", "g"), pooling=kind),
        spec(Dense(), 20, 4, name="plain"),
        spec(METHODS[method](None), 50, 8, name="uncached")
        if method != "robe"
        else spec(Dense(), 50, 8, name="u"),
        spec(METHODS[method](forever(rows=3)), 40, 8, name="last", pooling=kind),
    ]
    collection = Collection(tables).to(dtype)
    disturb(hold(collection, [0, 3, 4, 59, 30]))
    disturb(hold(collection, [1, 2], "last"))
    features = [collection.backend(target.table).table for target in collection.engine.targets]
    bags = make_bags(features, 9, weighted=pooling == "weighted")
    if bags.weights is not None:
        bags.weights = bags.weights.to(dtype).requires_grad_()
    inputs = [*collection.parameters(), *([] if bags.weights is None else [bags.weights])]
    ours, twin = collection(bags), plain_twin(collection, bags)
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(ours, twin, **tolerance)
    for mine, theirs in zip(gradients(ours, inputs), gradients(twin, inputs), strict=True):
        torch.testing.assert_close(mine.nan_to_num(0), theirs.nan_to_num(0), **tolerance)
        assert torch.equal(mine.isnan(), theirs.isnan())
    with torch.no_grad():
        torch.testing.assert_close(collection(bags), ours.detach(), **tolerance)


@pytest.mark.parametrize("cached", [[], [5], list(range(12))], ids=["none", "one", "all"])
@pytest.mark.parametrize(
    ("ids", "lengths"),
    [
        ([], []),
        ([], [0, 0, 0]),
        ([5, 5, 5], [3]),
        ([5], [0, 1, 0]),
        ([0, 5, 11, 5, 5, 0], [1, 4, 0, 1]),
    ],
    ids=["no-samples", "empty-bags", "duplicates", "one-id", "mixed"],
)
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_odd_batches(pooling: Pooling, ids: list[int], lengths: list[int], cached: list[int]) -> None:
    torch.manual_seed(0)
    table = spec(TensorTrain(rank=4, cache=forever(rows=12)), 40, 8, pooling=pooling)
    collection = Collection([table]).double()
    disturb(hold(collection, cached))
    if not cached:
        # A cache that could hold all that is asked is empty: every row comes from the parameters.
        assert not bool((collection.cache().ids >= 0).any())
    bags = bags_of(ids, lengths, 1)
    out = collection(bags)
    torch.testing.assert_close(out, plain_twin(collection, bags), rtol=1e-12, atol=1e-13)
    out.sum().backward()
    for parameter in collection.parameters():
        assert parameter.grad is not None


def test_tables_of_one_robe_array_have_caches_of_their_own() -> None:
    torch.manual_seed(0)
    shared = {"compress_rate": 4, "block_size": 8}
    tables = [
        spec(ROBE(**shared, cache=forever(rows=2)), 40, name="a"),
        spec(ROBE(**shared), 40, name="b"),
        spec(ROBE(**shared, cache=forever(rows=5)), 40, name="c"),
    ]
    collection = Collection(tables).double()
    disturb(hold(collection, [1, 2], "a"))
    disturb(hold(collection, [2, 3], "c"))
    keys = list(collection.state_dict())
    assert "tables.a.array" in keys
    assert "tables.c.array" not in keys
    assert "tables.a.cache.weight" in keys
    assert "tables.c.cache.weight" in keys
    bags = make_bags(tables, 6, weighted=False)
    torch.testing.assert_close(collection(bags), plain_twin(collection, bags), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_dense_forms(method: str) -> None:
    """``to_dense`` is the effective table, ``from_dense`` sets cached rows exactly."""
    torch.manual_seed(0)
    collection = Collection([spec(METHODS[method](forever(rows=4)))]).double()
    cache = hold(collection, [7, 9, 58])
    disturb(cache)
    backend = collection.backend()
    dense = backend.to_dense()
    out = collection(bags_of(list(range(60)), [1] * 60, 1)).detach()
    torch.testing.assert_close(dense, out, rtol=1e-12, atol=1e-13)
    assert torch.equal(backend.to_dense(8, 59), dense[8:59])
    wanted = torch.randn(60, 8, dtype=torch.float64)
    backend.from_dense(wanted)
    assert torch.equal(backend.to_dense()[[7, 9, 58]], wanted[[7, 9, 58]])
    without = Collection([spec(METHODS[method](None))]).double()
    without.load_state_dict(
        {name: value for name, value in collection.state_dict().items() if "cache" not in name}
    )
    without.backend().from_dense(wanted)
    others = [i for i in range(60) if i not in (7, 9, 58)]
    torch.testing.assert_close(
        backend.to_dense()[others], without.backend().to_dense()[others], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_is_independent(method: str) -> None:
    torch.manual_seed(0)
    collection = Collection([spec(METHODS[method](forever(rows=4)))])
    disturb(hold(collection, [1, 5]))
    twin = copy.deepcopy(collection)
    before = twin.backend().to_dense()
    hold(collection, [8, 9, 10])
    with torch.no_grad():
        for parameter in collection.parameters():
            parameter.add_(1)
    assert torch.equal(twin.backend().to_dense(), before)
    bags = bags_of([1, 5, 8, 0], [2, 2], 1)
    torch.testing.assert_close(twin(bags), plain_twin(twin, bags))


def test_shared_storage_is_counted_once() -> None:
    from recemb.backends import backend_of
    from recemb.backends.memory import memory_report

    tables: list[TableSpec] = [
        spec(ROBE(compress_rate=4, block_size=8, cache=forever(rows=3)), 40, name="a"),
        spec(ROBE(compress_rate=4, block_size=8, cache=forever(fraction=0.5)), 30, name="b"),
        *(spec(make(forever(rows=5)), name=method) for method, make in METHODS.items() if method != "robe"),
    ]
    collection = Collection(tables)
    stored = sum(p.numel() * p.element_size() for p in collection.parameters())
    kept = sum(b.numel() * b.element_size() for b in collection.buffers())
    assert memory_report(tables).total.num_bytes == stored + kept
    robe = backend_of(tables[0])
    groups = [tables[:2], *([table] for table in tables[2:])]
    # 140 weights in whole blocks of 8.
    assert robe.num_params(tables[:2]) == 144 + (3 + 15) * 8
    counted = sum(backend_of(group[0]).num_params(group) for group in groups)
    assert counted == sum(p.numel() for p in collection.parameters())


def test_a_collection_built_on_meta_starts_with_an_empty_cache() -> None:
    from recemb import EmbeddingBagCollection, EmbeddingBagConfig

    config = EmbeddingBagConfig(
        name="t",
        num_embeddings=60,
        embedding_dim=8,
        feature_names=["f"],
        compression=TensorTrain(rank=4, cache=forever(rows=5)),
    )
    collection = EmbeddingBagCollection(tables=[config], device="meta").to_empty(device="cpu")
    collection.reset_parameters()
    (cache,) = collection.hot_row_caches().values()
    assert cache.ids.tolist() == [-1] * 5
    assert cache.host_value("steps") == 0
    assert bool(torch.isfinite(collection.to_dense("t")).all())
    assert collection.cache_metrics()["t"].cached_rows == 0
    assert collection.memory().total.num_bytes == sum(
        tensor.numel() * tensor.element_size() for tensor in collection.state_dict().values()
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_rows(method: str, dtype: str) -> None:
    torch.manual_seed(0)
    table = replace(spec(METHODS[method](forever(rows=3))), dtype=dtype)
    collection = Collection([table])
    cache = hold(collection, [4, 5, 6])
    with torch.no_grad():
        cache.weight += torch.randn(3, 8).to(cache.weight.dtype)
        cache.scores.zero_()
    before = collection.backend().to_dense()[[4, 5, 6]]
    out = collection(bags_of([4, 9, 6], [2, 1], 1))
    assert out.dtype == cache.weight.dtype == getattr(torch, dtype)
    out.float().sum().backward()
    hold(collection, [40, 41, 42])
    # Written back as well as the type allows, and not worse than not at all.
    after = collection.backend().to_dense()[[4, 5, 6]]
    assert bool(torch.isfinite(after).all())
    assert float((after - before).float().norm()) < 3 * 8**0.5
    assert cache.metrics().write_back_error < 1
