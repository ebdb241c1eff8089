"""Law 7: imports of trained tables are the best ones, and a refused import touches nothing."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recemb.backends import base
from recemb.backends.base import Backend
from recemb.errors import ConfigError
from recemb.spec import (
    ROBE,
    Compression,
    DTypeName,
    MixedDimension,
    QuotientRemainder,
    TableSpec,
    TensorTrain,
)
from tests.backends.cases import CASES, Case, build_tables, table

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def imported(spec: TableSpec, weight: Tensor) -> Backend:
    """A table that holds ``weight`` as well as it can, in float64 so that rounding hides nothing."""
    tables = build_tables([spec]).double()
    backend = tables.backend(spec.name)
    backend.from_dense(weight)
    return backend


def squared_error(backend: Backend, weight: Tensor) -> float:
    return float((backend.to_dense() - weight).double().square().sum())


def random_weight(rows: int, dim: int, seed: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_step_lowers_the_error(backend: Backend, weight: Tensor, seed: int = 0) -> None:
    """The gradient of the error vanishes, and random steps of any size and in any parameter raise it."""
    parameters = list(backend.own_parameters().values())
    ids = torch.arange(backend.table.num_embeddings)
    error = (backend.rows(backend.map_ids(ids)) - weight).square().sum()
    least = float(error.detach())
    for gradient in torch.autograd.grad(error, parameters):
        assert float(gradient.abs().max()) <= 1e-5 * float(weight.norm())
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-2, 0.3):
        for chosen in (parameters[:1], parameters[-1:], parameters):
            saved = [parameter.detach().clone() for parameter in chosen]
            with torch.no_grad():
                for parameter in chosen:
                    step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(size * step)
            assert squared_error(backend, weight) > least
            with torch.no_grad():
                for parameter, value in zip(chosen, saved, strict=True):
                    parameter.copy_(value)


@every_case
def test_a_table_of_the_method_is_reproduced(case: Case) -> None:
    tables = build_tables(case.tables)
    torch.manual_seed(1)
    others = build_tables(case.tables)
    for spec in case.tables:
        dense = tables.backend(spec.name).to_dense()
        other = others.backend(spec.name)
        if len(case.tables) > 1:
            before = {name: p.detach().clone() for name, p in other.own_parameters().items()}
            with pytest.raises(ConfigError, match=r"shared with .*group of its own"):
                other.from_dense(dense)
            assert all(torch.equal(p, before[name]) for name, p in other.own_parameters().items())
        else:
            parameters = [p.data_ptr() for p in other.own_parameters().values()]
            other.from_dense(dense)
            assert [p.data_ptr() for p in other.own_parameters().values()] == parameters
            torch.testing.assert_close(other.to_dense(), dense, rtol=1e-5, atol=1e-5)


@every_case
def test_a_bad_weight_changes_nothing(case: Case) -> None:
    for backend in build_tables(case.tables).backends():
        rows, dim = backend.table.num_embeddings, backend.table.embedding_dim
        before = {name: p.detach().clone() for name, p in backend.own_parameters().items()}
        good = torch.zeros(rows, dim)
        nan, inf = good.clone(), good.clone()
        nan[rows - 1, dim - 1] = math.nan
        inf[0, 0] = -math.inf
        for bad, reason in (
            (torch.zeros(rows + 1, dim), "shape"),
            (torch.zeros(rows, dim + 1), "shape"),
            (torch.zeros(rows * dim), "shape"),
            (good.long(), "floating-point"),
            (nan, "NaN or infinite"),
            (inf, "NaN or infinite"),
        ):
            with pytest.raises(ConfigError, match=reason) as caught:
                backend.from_dense(bad)
            assert repr(backend.table.name) in str(caught.value)
        assert all(torch.equal(p, before[name]) for name, p in backend.own_parameters().items())


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("bfloat16", 1e39), ("float32", 1e39)])
@every_case
def test_weights_beyond_the_tables_dtype_change_nothing(case: Case, dtype: DTypeName, value: float) -> None:
    if len(case.tables) > 1:
        return
    backend = build_tables([replace(case.tables[0], dtype=dtype)]).backends()[0]
    before = {name: p.detach().clone() for name, p in backend.own_parameters().items()}
    weight = torch.zeros(backend.table.num_embeddings, backend.table.embedding_dim, dtype=torch.float64)
    weight[-1, -1] = value
    with pytest.raises(ConfigError, match=rf"table 't': from_dense .* torch\.{dtype} does not hold"):
        backend.from_dense(weight)
    assert all(torch.equal(p, before[name]) for name, p in backend.own_parameters().items())


@pytest.mark.parametrize(
    "compression", [MixedDimension(dim=2), TensorTrain(rank=3, row_shape=(4, 3, 5), dim_shape=(3, 1, 4))]
)
def test_factors_beyond_the_tables_dtype_change_nothing(compression: Compression) -> None:
    """Rows of 60,000 go into half precision, and their length, which factors have, does not."""
    backend = build_tables([replace(table(50, 12, compression), dtype="float16")]).backend("t")
    before = {name: p.detach().clone() for name, p in backend.own_parameters().items()}
    with pytest.raises(ConfigError, match=r"table 't': from_dense .* torch\.float16 does not hold"):
        backend.from_dense(torch.full((50, 12), 6e4))
    assert all(torch.equal(p, before[name]) for name, p in backend.own_parameters().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_weight_may_have_any_float_dtype(dtype: torch.dtype) -> None:
    for case in CASES:
        if len(case.tables) > 1:
            continue
        backend = build_tables(case.tables).backends()[0]
        weight = backend.to_dense().to(dtype).requires_grad_()
        backend.from_dense(weight)
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in backend.own_parameters().values())
        assert weight.grad is None


def test_half_precision_storage_takes_an_import() -> None:
    weight = random_weight(40, 8, 0).float()
    for compression in (
        TensorTrain(rank=64),
        MixedDimension(dim=8),
        QuotientRemainder(collisions=1, operation="add"),
    ):
        spec = replace(table(40, 8, compression), dtype="float16")
        backend = build_tables([spec]).backend("t")
        backend.from_dense(weight)
        torch.testing.assert_close(backend.to_dense().float(), weight, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("block_numel", [1, 50])
def test_imports_do_not_depend_on_the_block_size(block_numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compressions: list[Compression] = [
        TensorTrain(rank=2),
        MixedDimension(dim=3),
        QuotientRemainder(collisions=7),
        ROBE(compress_rate=5, block_size=3, use_sign=True),
    ]
    weight = random_weight(60, 8, 1)
    whole = [imported(table(60, 8, c), weight).to_dense() for c in compressions]
    monkeypatch.setattr(base, "BLOCK_NUMEL", block_numel)
    for compression, expected in zip(compressions, whole, strict=True):
        again = imported(table(60, 8, compression), weight).to_dense()
        torch.testing.assert_close(again, expected, rtol=1e-7, atol=1e-8)


@given(st.integers(1, 40), st.integers(1, 9), st.data())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_mixed_dimension_import_is_the_eckart_young_optimum(rows: int, dim: int, data: st.DataObject) -> None:
    narrow = data.draw(st.integers(1, dim))
    weight = random_weight(rows, dim, data.draw(st.integers(0, 99)))
    singular = torch.linalg.svdvals(weight)
    error = squared_error(imported(table(rows, dim, MixedDimension(dim=narrow)), weight), weight)
    assert error == pytest.approx(float(singular[narrow:].square().sum()), rel=1e-9, abs=1e-9)


@st.composite
def train_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    order = draw(st.integers(2, 4))
    rows = draw(st.lists(st.integers(1, 7), min_size=order, max_size=order))
    dims = draw(st.lists(st.integers(1, 3), min_size=order, max_size=order))
    ranks = draw(st.lists(st.integers(1, 8), min_size=order - 1, max_size=order - 1))
    return tuple(rows), tuple(dims), tuple(ranks)


def unfoldings(weight: Tensor, rows: tuple[int, ...], dims: tuple[int, ...]) -> list[Tensor]:
    """The d - 1 matrices that part cores 1 .. k from k + 1 .. d, built one element at a time."""
    matrices = []
    for k in range(1, len(rows)):
        below, beside = math.prod(rows[k:]), math.prod(dims[k:])
        matrix = torch.zeros(math.prod(rows[:k]) * math.prod(dims[:k]), below * beside, dtype=torch.float64)
        for i in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                at = (i // below) * math.prod(dims[:k]) + j // beside
                matrix[at, (i % below) * beside + j % beside] = weight[i, j]
        matrices.append(matrix)
    return matrices


@given(train_shapes(), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_tt_svd_error_bound(
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], seed: int
) -> None:
    """error**2 <= sum over the bonds of the squared singular values beyond the rank (Oseledets, 2011)."""
    rows, dims, ranks = shapes
    number, dim = math.prod(rows), math.prod(dims)
    compression = TensorTrain(rank=ranks, num_cores=len(rows), row_shape=rows, dim_shape=dims)
    # Columns of very different size: a truncation that forgets the singular values is then far off.
    weight = random_weight(number, dim, seed) * torch.logspace(0, -2, dim, dtype=torch.float64)
    weight = weight * torch.logspace(0, -2, number, dtype=torch.float64)[:, None]
    discarded = [
        float(torch.linalg.svdvals(matrix)[rank:].square().sum())
        for matrix, rank in zip(unfoldings(weight, rows, dims), ranks, strict=True)
    ]
    error = squared_error(imported(table(number, dim, compression), weight), weight)
    assert error <= sum(discarded) * (1 + 1e-6) + 1e-10 * float(weight.square().sum())
    # No train of these ranks can do better than the worst bond alone.
    assert error >= max(discarded) * (1 - 1e-6) - 1e-10 * float(weight.square().sum())


@given(st.integers(2, 300), st.sampled_from([4, 7, 8, 16]), st.integers(2, 4), st.integers(1, 4))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_a_table_of_exact_tt_rank_is_reproduced(rows: int, dim: int, order: int, rank: int) -> None:
    spec = table(rows, dim, TensorTrain(rank=rank, num_cores=order))
    backend = build_tables([spec]).double().backend("t")
    heights = [core.shape[0] for core in backend.own_parameters().values()]
    whole = rows // math.prod(heights[1:])
    first_dim = next(iter(backend.own_parameters().values())).shape[1] // rank
    if whole * first_dim < rank and math.prod(heights) != rows:
        # Fewer rows than the rank in the slices that are whole: they do not determine the other cores.
        return
    weight = backend.to_dense()
    error = squared_error(imported(spec, weight), weight)
    assert error <= 1e-8 * float(weight.square().sum())


@pytest.mark.parametrize("rows", [33, 37, 50])
def test_rows_beyond_n_do_not_cost_the_real_ones(rows: int) -> None:
    """The import of a random table is at least as good as TT-SVD of the table padded with zeros."""
    compression = TensorTrain(rank=3, row_shape=(4, 3, 5), dim_shape=(2, 2, 2))
    weight = random_weight(rows, 8, rows)
    padded = torch.cat([weight, torch.zeros(60 - rows, 8, dtype=torch.float64)])
    zeros = imported(table(60, 8, compression), padded).to_dense()[:rows]
    error = squared_error(imported(table(rows, 8, compression), weight), weight)
    assert error <= float((zeros - weight).square().sum()) * (1 + 1e-9)


Operation = Literal["mult", "add", "concat"]


@given(st.data(), st.integers(2, 60), st.sampled_from(["mult", "add", "concat"]))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_no_step_of_q_or_r_lowers_the_error(data: st.DataObject, rows: int, operation: Operation) -> None:
    collisions = data.draw(st.integers(1, rows))
    if operation == "mult":
        # With cells of the last group absent the product has local optima and infima that no q, r attain.
        rows = rows // collisions * collisions
    weight = random_weight(rows, 3, data.draw(st.integers(0, 99)))
    spec = table(rows, 3, QuotientRemainder(collisions=collisions, operation=operation))
    no_step_lowers_the_error(imported(spec, weight), weight)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_qr_mult_import_of_whole_groups_is_the_rank_1_svd(
    quotients: int, collisions: int, seed: int, aligned: bool
) -> None:
    """Column by column, the grid [N / c, c] is best fitted by its leading singular pair."""
    grids = random_weight(quotients * collisions, 2, seed).view(quotients, collisions, 2)
    if aligned:
        # One large group beside many smaller ones that agree: the largest group is not the best direction.
        grids = torch.zeros_like(grids)
        grids[0, 0] = 1.5
        grids[1:, -1] = 1.0
    weight = grids.reshape(-1, 2)
    spec = table(quotients * collisions, 2, QuotientRemainder(collisions=collisions))
    optimum = sum(float(torch.linalg.svdvals(grids[:, :, k])[1:].square().sum()) for k in range(2))
    error = squared_error(imported(spec, weight), weight)
    assert error == pytest.approx(optimum, rel=1e-4, abs=1e-9)


@given(st.integers(6, 60), st.integers(0, 99), st.data())
@settings(derandomize=True, deadline=None, max_examples=20)
def test_qr_mult_import_of_a_broken_last_group_is_near_the_best_of_many_starts(
    rows: int, seed: int, data: st.DataObject
) -> None:
    collisions = data.draw(st.integers(2, rows // 2))
    weight = random_weight(rows, 1, seed)
    groups = -(-rows // collisions)
    present = torch.zeros(groups * collisions, dtype=torch.float64)
    present[:rows] = 1
    grid = torch.zeros_like(present)
    grid[:rows] = weight[:, 0]
    present, grid = present.view(groups, collisions), grid.view(groups, collisions)
    best = float(grid.square().sum())
    for start in range(4):
        r = random_weight(collisions, 1, start)[:, 0]
        for _ in range(200):
            q = (grid * r).sum(1) / (present * r.square()).sum(1)
            r = (grid * q[:, None]).sum(0) / (present * q[:, None].square()).sum(0)
        best = min(best, float(((grid - present * q[:, None] * r).square()).sum()))
    backend = imported(table(rows, 1, QuotientRemainder(collisions=collisions)), weight)
    assert squared_error(backend, weight) <= best + 1e-3 * float(weight.square().sum())


def test_qr_concat_import_is_the_exact_mean() -> None:
    rows, c = 11, 4
    weight = random_weight(rows, 5, 2)
    backend = imported(table(rows, 5, QuotientRemainder(collisions=c, operation="concat")), weight)
    q, r = backend.own_parameters()["q"].tolist(), backend.own_parameters()["r"].tolist()
    for group in range(3):
        members = [weight[i, :2] for i in range(rows) if i // c == group]
        assert q[group] == pytest.approx((sum(members) / len(members)).tolist(), rel=1e-12)
    for rest in range(c):
        members = [weight[i, 2:] for i in range(rows) if i % c == rest]
        assert r[rest] == pytest.approx((sum(members) / len(members)).tolist(), rel=1e-12)


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_qr_import_of_zeros_is_zero(operation: Operation) -> None:
    spec = table(10, 4, QuotientRemainder(collisions=3, operation=operation))
    assert not imported(spec, torch.zeros(10, 4)).to_dense().any()


@given(st.data(), st.integers(6, 60), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=30)
def test_robe_import_is_least_squares(data: st.DataObject, rows: int, use_sign: bool) -> None:
    block_size, rate = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1.0, 1.5, 2.4]))
    compression = ROBE(compress_rate=rate, block_size=block_size, use_sign=use_sign)
    weight = random_weight(rows, 3, data.draw(st.integers(0, 99)))
    backend = imported(table(rows, 3, compression), weight)
    # A plain-Python fit: every weight is the mean of the signed elements that land on it.
    size = backend.own_parameters()["array"].numel()
    sums, counts = [0.0] * size, [0] * size
    for i, slots in enumerate(backend.map_ids(torch.arange(rows)).tolist()):
        for j in range(3):
            slot, sign = slots[j // block_size], 1
            if slot < 0:
                slot, sign = -slot - 1, -1
            at = (slot + j % block_size) % size
            sums[at] += sign * float(weight[i, j])
            counts[at] += 1
    means = [s / max(1, n) for s, n in zip(sums, counts, strict=True)]
    assert backend.own_parameters()["array"].flatten().tolist() == pytest.approx(means, rel=1e-12, abs=1e-14)
    no_step_lowers_the_error(backend, weight, seed=random.Random(rows).randrange(99))
