"""The laws of ``recemb/backends/base.py`` over every case of every backend."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recemb.backends import BACKENDS, backend_of, base, build, storages
from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.spec import TableSpec, TensorTrain
from tests.backends.cases import (
    CASES,
    Case,
    Tables,
    bags_of,
    build_tables,
    gradients,
    make_bags,
    naive_pooled,
    some_ids,
)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
BATCH = 7


def features_of(case: Case, weighted: bool) -> list[TableSpec]:
    """One feature per table, the first table twice; MEAN tables have no weighted meaning."""
    tables = [spec for spec in case.tables if not (weighted and spec.pooling == "mean")]
    return tables + tables[:1]


def cast(bags: Bags, dtype: torch.dtype) -> Bags:
    weights = None if bags.weights is None else bags.weights.to(dtype)
    return Bags(bags.ids, bags.offsets, bags.num_features, weights)


def pooled(tables: Tables, features: list[TableSpec], bags: Bags) -> Tensor:
    backends = [tables.backend(spec.name) for spec in features]
    return type(backends[0]).pooled(backends, bags)


def every_slot(backend: Backend) -> Tensor:
    return backend.map_ids(torch.arange(backend.table.num_embeddings))


def test_every_backend_has_a_case() -> None:
    entered = {backend_of(spec) for case in CASES for spec in case.tables}
    assert entered == set(BACKENDS)
    assert len({case.id for case in CASES}) == len(CASES)
    for case in CASES:
        assert len(storages(case.tables)) == 1, f"{case.id} is not one storage"


def test_every_method_has_its_oracle_file() -> None:
    folder = Path(__file__).parent
    for backend in BACKENDS:
        name = backend.__module__.rsplit(".", 1)[1]
        assert (folder / f"test_oracle_{name}.py").is_file(), f"no oracle test for {name}"


@every_case
def test_num_params_is_numel_and_parameters_are_2d(case: Case) -> None:
    tables = build_tables(case.tables)
    parameters = list(tables.parameters())
    assert backend_of(case.tables[0]).num_params(case.tables) == sum(p.numel() for p in parameters)
    assert all(parameter.dim() == 2 for parameter in parameters)
    first, *others = tables.backends()
    assert len(dict(first.named_parameters())) == len(parameters)
    for other in others:
        assert not list(other.parameters())
        assert [p.data_ptr() for p in other.own_parameters().values()] == [p.data_ptr() for p in parameters]


@every_case
def test_map_ids_is_pure(case: Case) -> None:
    for backend in build_tables(case.tables).backends():
        ids = torch.tensor(some_ids(backend.table, 30, seed=1))
        before = ids.clone()
        slots = backend.map_ids(ids)
        assert slots.dtype == torch.int64
        assert slots.dim() == 2
        assert slots.shape[0] == 30
        assert not slots.requires_grad
        assert torch.equal(ids, before)
        order = torch.randperm(30)
        assert torch.equal(backend.map_ids(ids[order]), slots[order])
        for position in (0, 7, 29):
            assert torch.equal(backend.map_ids(ids[position : position + 1]), slots[position : position + 1])
        with torch.no_grad():
            for parameter in backend.own_parameters().values():
                parameter.add_(1)
        assert torch.equal(backend.map_ids(ids), slots)
        assert backend.map_ids(ids[:0]).shape == (0, slots.shape[1])


@every_case
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_pooled_equals_pooling_of_rows(case: Case, weighted: bool) -> None:
    features = features_of(case, weighted)
    if not features:
        # Every table of the case pools by mean; with weights that is refused when the collection is built.
        assert all(spec.pooling == "mean" for spec in case.tables)
        return
    tables = build_tables(case.tables).double()
    bags = make_bags(features, BATCH, weighted=weighted)
    weights = [] if bags.weights is None else [bags.weights.requires_grad_()]
    inputs = [*tables.parameters(), *weights]
    fused = pooled(tables, features, bags)
    naive = naive_pooled([tables.backend(spec.name) for spec in features], bags)
    assert fused.shape == (BATCH, sum(spec.embedding_dim for spec in features))
    torch.testing.assert_close(fused, naive, rtol=1e-12, atol=1e-13)
    for got, expected in zip(gradients(fused, inputs), gradients(naive, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    assert float(naive.detach().abs().max()) > 0


@every_case
@pytest.mark.parametrize("lengths", [[0, 0, 0], []], ids=["all-bags-empty", "empty-batch"])
def test_f9_no_ids_pool_to_zeros_with_zero_gradients(case: Case, lengths: list[int]) -> None:
    tables = build_tables(case.tables)
    features = list(case.tables)
    bags = bags_of([], lengths * len(features), len(features))
    output = pooled(tables, features, bags)
    assert torch.equal(output, torch.zeros(len(lengths), sum(t.embedding_dim for t in features)))
    output.sum().backward()
    for parameter in tables.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@every_case
def test_one_feature_without_ids_beside_others(case: Case) -> None:
    tables = build_tables(case.tables).double()
    features = [case.tables[0], case.tables[-1]]
    ids = some_ids(case.tables[-1], 3, seed=2)
    bags = bags_of(ids, [0, 0, 1, 2], 2)
    output = pooled(tables, features, bags)
    dim = case.tables[0].embedding_dim
    assert torch.equal(output[:, :dim], torch.zeros(2, dim, dtype=torch.float64))
    backends = [tables.backend(spec.name) for spec in features]
    torch.testing.assert_close(output, naive_pooled(backends, bags), rtol=1e-12, atol=1e-13)


@every_case
def test_gradcheck_of_rows(case: Case) -> None:
    tables = build_tables(case.tables).double()
    for backend in tables.backends():
        slots = backend.map_ids(torch.tensor(some_ids(backend.table, 6, seed=3)))
        inputs = tuple(backend.own_parameters().values())
        assert torch.autograd.gradcheck(lambda *_: backend.rows(slots), inputs, fast_mode=True)  # noqa: B023


@every_case
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_gradcheck_of_pooled(case: Case, weighted: bool) -> None:
    features = features_of(case, weighted)
    if not features:
        assert all(spec.pooling == "mean" for spec in case.tables)
        return
    tables = build_tables(case.tables).double()
    bags = make_bags(features, 4, weighted=weighted, seed=5)
    weights = () if bags.weights is None else (bags.weights.requires_grad_(),)
    inputs = (*tables.parameters(), *weights)
    assert torch.autograd.gradcheck(lambda *_: pooled(tables, features, bags), inputs, fast_mode=True)


@every_case
def test_order_of_samples_and_ids_does_not_matter(case: Case) -> None:
    tables = build_tables(case.tables).double()
    features = list(case.tables)
    bags = make_bags(features, BATCH, weighted=False, seed=6)
    whole = pooled(tables, features, bags)
    offsets = bags.offsets.tolist()
    bag_ids = [bags.ids[a:b].tolist() for a, b in pairwise(offsets)]
    order = list(range(BATCH))
    random.Random(7).shuffle(order)
    assert order != sorted(order)

    def pool(samples: list[int], reverse: bool) -> Tensor:
        chosen = [
            bag_ids[f * BATCH + s][:: -1 if reverse else 1] for f in range(len(features)) for s in samples
        ]
        flat = [i for bag in chosen for i in bag]
        return pooled(tables, features, bags_of(flat, [len(bag) for bag in chosen], len(features)))

    torch.testing.assert_close(pool(order, False), whole[order], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(pool(order, True), whole[order], rtol=1e-12, atol=1e-13)
    for sample in range(BATCH):
        alone = pool([sample], False)
        torch.testing.assert_close(alone, whole[sample : sample + 1], rtol=1e-13, atol=1e-14)


@every_case
def test_a_lookup_repeats_bit_for_bit(case: Case) -> None:
    tables = build_tables(case.tables)
    features = list(case.tables)
    bags = make_bags(features, BATCH, weighted=False, seed=8)
    inputs = list(tables.parameters())
    first = pooled(tables, features, bags)
    second = pooled(tables, features, bags)
    assert torch.equal(first, second)
    for a, b in zip(gradients(first, inputs), gradients(second, inputs), strict=True):
        assert torch.equal(a, b)


@every_case
@pytest.mark.parametrize("block_numel", [1, 37, 2**24])
def test_to_dense_equals_lookup(case: Case, block_numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BLOCK_NUMEL", block_numel)
    for backend in build_tables(case.tables).backends():
        rows, dim = backend.table.num_embeddings, backend.table.embedding_dim
        dense = backend.to_dense()
        assert dense.shape == (rows, dim)
        assert not dense.requires_grad
        torch.testing.assert_close(dense, backend.rows(every_slot(backend)), rtol=1e-6, atol=1e-7)
        ids = torch.tensor(some_ids(backend.table, 10, seed=9))
        bags = Bags(ids, torch.arange(11), 1)
        torch.testing.assert_close(type(backend).pooled([backend], bags), dense[ids], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            backend.to_dense(rows // 3, rows), dense[rows // 3 :], rtol=1e-6, atol=1e-7
        )
        assert backend.to_dense(rows, rows).shape == (0, dim)
        few = backend.compressed_rows(ids)
        assert not few.requires_grad
        torch.testing.assert_close(few, backend.rows(backend.map_ids(ids)), rtol=1e-6, atol=1e-7)


def test_rows_of_a_train_are_rebuilt_in_blocks_of_the_slices_that_they_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of rank 8 and D = 2 x 1 x 8, a row copies slices of up to 64 weights."""
    table = TableSpec(
        name="t", num_embeddings=100, embedding_dim=16, feature_names=("f",), compression=TensorTrain(rank=8)
    )
    (backend,) = build([table], torch.device("cpu")).values()
    monkeypatch.setattr(base, "BLOCK_NUMEL", 10 * 8 * 8)
    blocks: list[int] = []
    rows = backend.rows
    monkeypatch.setattr(backend, "rows", lambda slots: blocks.append(len(slots)) or rows(slots))
    backend.compressed_rows(torch.arange(25))
    backend.to_dense()
    assert blocks == [10, 10, 5] + 10 * [10]


def within_twice_the_error_of_plain_torch(draws: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """max|got - exact| <= 2 max|plain - exact| + 1 ulp of the largest value, in the dtype of ``got``.

    Each draw is (got, plain, exact). The two sides are averaged over the draws: the largest error of a single
    small batch is mostly luck, for plain torch too.
    """
    errors, allowed = [], []
    for got, plain, exact in draws:
        assert got.shape == plain.shape == exact.shape
        if exact.numel():
            ulp = float(torch.finfo(got.dtype).eps * exact.detach().abs().max())
            allowed.append(2 * float((plain.double() - exact).detach().abs().max()) + ulp)
            errors.append(float((got.double() - exact).detach().abs().max()))
    assert sum(errors) <= sum(allowed)


@every_case
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_float32_error_is_at_most_twice_plain_torch(case: Case, weighted: bool) -> None:
    features = features_of(case, weighted)
    if not features:
        assert all(spec.pooling == "mean" for spec in case.tables)
        return
    draws: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    for seed in range(8):
        torch.manual_seed(seed)
        tables = build_tables(case.tables)
        exact = copy.deepcopy(tables).double()
        bags = cast(make_bags(features, 12, weighted=weighted, seed=seed), torch.float32)
        # Widened after the rounding to float32, so that both see the same weights.
        wide = cast(bags, torch.float64)
        leaves = [[] if b.weights is None else [b.weights.requires_grad_()] for b in (bags, wide)]
        narrow_inputs, wide_inputs = [*tables.parameters(), *leaves[0]], [*exact.parameters(), *leaves[1]]
        outputs = (
            (pooled(tables, features, bags), narrow_inputs),
            (naive_pooled([tables.backend(spec.name) for spec in features], bags), narrow_inputs),
            (naive_pooled([exact.backend(spec.name) for spec in features], wide), wide_inputs),
        )
        fused, plain, reference = ([output, *gradients(output, inputs)] for output, inputs in outputs)
        draws.append(list(zip(fused, plain, reference, strict=True)))
    for values in zip(*draws, strict=True):
        within_twice_the_error_of_plain_torch(list(values))


@every_case
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_storage(case: Case, dtype: str) -> None:
    specs = [replace(spec, dtype=dtype) for spec in case.tables]
    tables = build_tables(specs)
    kind: torch.dtype = getattr(torch, dtype)
    assert all(p.dtype == kind for p in tables.parameters())
    exact = copy.deepcopy(tables).double()
    bags = make_bags(specs, BATCH, weighted=False, seed=11)
    backends = [tables.backend(spec.name) for spec in specs]
    output = pooled(tables, specs, bags)
    assert output.dtype == kind
    reference = naive_pooled([exact.backend(spec.name) for spec in specs], bags)
    plain = naive_pooled(backends, bags)
    within_twice_the_error_of_plain_torch([(output, plain, reference)])
    for backend in backends:
        assert backend.to_dense().dtype == kind
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tables.parameters())


@every_case
def test_state_dict_roundtrip(case: Case, tmp_path: Path) -> None:
    saved = build_tables(case.tables)
    save_file(saved.state_dict(), tmp_path / "tables.safetensors")
    torch.manual_seed(99)
    for loaded in (build_tables(case.tables), build_tables(case.tables, "meta").to_empty(device="cpu")):
        assert isinstance(loaded, Tables)
        loaded.load_state_dict(load_file(tmp_path / "tables.safetensors"))
        for before, after in zip(saved.backends(), loaded.backends(), strict=True):
            assert torch.equal(before.to_dense(), after.to_dense())
    assigned = build_tables(case.tables, "meta")
    assigned.load_state_dict(load_file(tmp_path / "tables.safetensors"), assign=True)
    for before, after in zip(saved.backends(), assigned.backends(), strict=True):
        assert torch.equal(before.to_dense(), after.to_dense())


@every_case
def test_deepcopy_is_independent(case: Case) -> None:
    tables = build_tables(case.tables)
    before = [backend.to_dense() for backend in tables.backends()]
    twin = copy.deepcopy(tables)
    assert not {p.data_ptr() for p in tables.parameters()} & {p.data_ptr() for p in twin.parameters()}
    with torch.no_grad():
        for parameter in tables.parameters():
            parameter.add_(1)
    for backend, dense in zip(twin.backends(), before, strict=True):
        assert torch.equal(backend.to_dense(), dense)
    for backend, dense in zip(tables.backends(), before, strict=True):
        assert not torch.equal(backend.to_dense(), dense)


@every_case
def test_meta_tables_say_what_to_do(case: Case) -> None:
    tables = build_tables(case.tables, "meta")
    for backend in tables.backends():
        with pytest.raises(ValueError, match=r"meta device.*to_empty"):
            backend.to_dense()
        with pytest.raises(ValueError, match=r"meta device.*to_empty"):
            backend.from_dense(torch.zeros(backend.table.num_embeddings, backend.table.embedding_dim))


@pytest.fixture
def poisoned() -> object:
    """torch.empty (and kin) hand out NaN, so that a value that was never written is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@every_case
def test_uninitialised_memory_is_never_read(case: Case, poisoned: object) -> None:
    assert torch.empty(3).isnan().all()
    tables = build_tables(case.tables)
    features = list(case.tables)
    assert all(p.isfinite().all() for p in tables.parameters())
    output = pooled(tables, features, make_bags(features, BATCH, weighted=False))
    assert output.isfinite().all()
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tables.parameters())
    for backend in tables.backends():
        assert backend.to_dense().isfinite().all()
