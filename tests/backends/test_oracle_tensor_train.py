"""A tensor-train row computed with Python lists, straight from TT-Rec's formula (arXiv 2101.11714).

row[j] = G_1[i_1][:, j_1, :] G_2[i_2][:, j_2, :] ... with i in mixed radix of p, j in mixed radix of q, the
most significant digit first. Nothing of recemb's arithmetic is used: p is read off the cores' heights.
"""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.engine import Engine
from recemb.spec import TableSpec, TensorTrain
from tests.backends.cases import Tables, bags_of, build_tables, table

Core = list[list[float]]
FAR = [2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**33 - 1]


def digits_of(number: int, radices: list[int]) -> list[int]:
    """Most significant first."""
    digits = []
    for radix in reversed(radices):
        number, digit = divmod(number, radix)
        digits.append(digit)
    assert number == 0
    return digits[::-1]


def oracle_row(cores: list[Core], dims: list[int], ranks: list[int], row: int) -> list[float]:
    place = digits_of(row, [len(core) for core in cores])
    values = []
    for column in range(math.prod(dims)):
        split = digits_of(column, dims)
        vector = [1.0]
        for k, core in enumerate(cores):
            flat, left, right = core[place[k]], ranks[k], ranks[k + 1]
            assert len(flat) == left * dims[k] * right
            vector = [
                sum(vector[a] * flat[(a * dims[k] + split[k]) * right + b] for a in range(left))
                for b in range(right)
            ]
        assert len(vector) == 1
        values.append(vector[0])
    return values


def core_lists(tables: Tables, spec: TableSpec) -> list[Core]:
    parameters = tables.backend(spec.name).own_parameters()
    assert list(parameters) == [f"core_{k}" for k in range(len(parameters))]
    return [core.tolist() for core in parameters.values()]


def check_rows(spec: TableSpec, dims: list[int], ids: list[int]) -> None:
    compression = spec.compression
    assert isinstance(compression, TensorTrain)
    inner = compression.rank
    ranks = [1, *(inner if isinstance(inner, tuple) else (inner,) * (compression.num_cores - 1)), 1]
    tables = build_tables([spec]).double()
    cores = core_lists(tables, spec)
    assert math.prod(len(core) for core in cores) >= spec.num_embeddings
    backend = tables.backend(spec.name)
    slots = backend.map_ids(torch.tensor(ids))
    assert slots.tolist() == [digits_of(i, [len(core) for core in cores]) for i in ids]
    expected = torch.tensor([oracle_row(cores, dims, ranks, i) for i in ids], dtype=torch.float64)
    torch.testing.assert_close(backend.rows(slots), expected, rtol=1e-11, atol=1e-12)
    looked_up = Engine([spec])(tables, bags_of(ids, [1] * len(ids), 1))
    torch.testing.assert_close(looked_up, expected, rtol=1e-11, atol=1e-12)


def dims_of(tables: Tables, spec: TableSpec, ranks: list[int]) -> list[int]:
    """q_k from the width R_{k-1} q_k R_k of the cores."""
    widths = [parameter.shape[1] for parameter in tables.backend(spec.name).own_parameters().values()]
    return [width // (ranks[k] * ranks[k + 1]) for k, width in enumerate(widths)]


@given(st.data(), st.integers(2, 4))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_given_shapes(data: st.DataObject, order: int) -> None:
    rows = data.draw(st.lists(st.integers(1, 5), min_size=order, max_size=order))
    dims = data.draw(st.lists(st.integers(1, 3), min_size=order, max_size=order))
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=order - 1, max_size=order - 1))
    number = data.draw(st.integers(1, math.prod(rows)))
    ids = data.draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=5))
    compression = TensorTrain(
        rank=tuple(ranks), num_cores=order, row_shape=tuple(rows), dim_shape=tuple(dims)
    )
    check_rows(table(number, math.prod(dims), compression), dims, [*ids, 0, number - 1])


@given(st.data(), st.integers(1, 400), st.sampled_from([1, 2, 6, 7, 12, 16]), st.integers(2, 4))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_automatic_shapes(data: st.DataObject, number: int, dim: int, order: int) -> None:
    rank = data.draw(st.integers(1, 4))
    spec = table(number, dim, TensorTrain(rank=rank, num_cores=order))
    dims = dims_of(build_tables([spec]), spec, [1, *[rank] * (order - 1), 1])
    assert math.prod(dims) == dim
    ids = data.draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=5))
    check_rows(spec, dims, [*ids, 0, number - 1])


@given(st.integers(2, 4), st.integers(2, 3), st.lists(st.integers(0, 2**33 - 1), max_size=3))
@settings(derandomize=True, deadline=None, max_examples=6)
def test_f5_ids_beyond_float32_and_int32(order: int, rank: int, ids: list[int]) -> None:
    spec = table(2**33, 4, TensorTrain(rank=rank, num_cores=max(3, order)))
    dims = dims_of(build_tables([spec]), spec, [1, *[rank] * (max(3, order) - 1), 1])
    check_rows(spec, dims, [*ids, *FAR])


def test_f14_two_to_the_33_rows_of_64() -> None:
    spec = table(2**33, 64, TensorTrain(rank=4))
    dims = dims_of(build_tables([spec]), spec, [1, 4, 4, 1])
    assert dims == [4, 4, 4]
    check_rows(spec, dims, [0, 1, 2**33 - 2, *FAR])


def test_a_row_by_hand() -> None:
    """2 x 2 rows, 1 x 2 columns, rank 2: row 3 uses the second slice of both cores."""
    spec = table(4, 2, TensorTrain(rank=2, num_cores=2, row_shape=(2, 2), dim_shape=(1, 2)))
    tables = build_tables([spec])
    parameters = tables.backend("t").own_parameters()
    with torch.no_grad():
        parameters["core_0"].copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        # [p, R_1 * q_2 * R_2]: for row 1, bond 0 holds (5, 6) and bond 1 holds (7, 8).
        parameters["core_1"].copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 6.0, 7.0, 8.0]]))
    assert tables.backend("t").to_dense().tolist() == [
        [0, 0],
        [1 * 5 + 2 * 7, 1 * 6 + 2 * 8],
        [0, 0],
        [3 * 5 + 4 * 7, 3 * 6 + 4 * 8],
    ]
