"""Stored, paired and projected rows by Triton kernels, against plain torch and the CPU's kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recemb_kernels.digit_tree.group import Batch, FeatureCode
from recemb_kernels.pooled_gather import Operation, RowShape, pooled_gather
from recemb_kernels.update import Kind, Update
from tests.kernels.triton.examples import examples
from tests.kernels.triton.harness import (
    DTYPES,
    KINDS,
    Tables,
    assert_bits_without_waiting,
    assert_near,
    assert_nothing_steps,
    assert_offsets_stay_in_bounds,
    assert_same_steps,
    kinds_of_bags,
    make_batch,
    plain_all,
    run,
    upstream,
)

ROW, MULT, ADD, CONCAT, PROJECT = Operation
SHAPES = (
    RowShape(ROW, (50,), (5,)),
    RowShape(MULT, (9, 7), (6, 6)),
    RowShape(PROJECT, (40, 3), (3, 8)),
    # More remainders than one program sums: pieces.
    RowShape(ADD, (4, 300), (6, 6)),
    RowShape(CONCAT, (20, 5), (4, 3)),
    # Second tables of a family, of other sizes.
    RowShape(ROW, (30,), (5,)),
    RowShape(MULT, (5, 30), (6, 6)),
    RowShape(PROJECT, (20, 3), (3, 8)),
)
# Every table once, some by two features and some of these by part of their rows.
FEATURES = (
    *(FeatureCode(t, t % 2 == 0) for t in range(len(SHAPES))),
    *(FeatureCode(t, t == 1) for t in (0, 1, 2, 4)),
    *(FeatureCode(t, False, 20) for t in (0, 3, 2)),
)


def _rows(shape: RowShape, parameters: Sequence[Tensor], keys: Tensor) -> Tensor:
    if shape.operation == ROW:
        return parameters[0][keys]
    if shape.operation == PROJECT:
        return parameters[0][keys] @ parameters[1]
    left, right = parameters[0][keys // shape.rows[1]], parameters[1][keys % shape.rows[1]]
    if shape.operation == CONCAT:
        return torch.cat((left, right), 1)
    return left * right if shape.operation == MULT else left + right


def _tables(shapes: Sequence[RowShape], features: Sequence[FeatureCode] | None = None) -> Tables:
    return Tables(
        pooled_gather,
        _rows,
        lambda shape: list(zip(shape.rows, shape.widths, strict=True)),
        shapes,
        [FeatureCode(t, False) for t in range(len(shapes))] if features is None else features,
        std=lambda shape: shape.widths[0] ** -0.25 if shape.operation == PROJECT else 1.0,
    )


ALL = _tables(SHAPES, FEATURES)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_are_those_of_plain_torch(dtype: torch.dtype, weighted: bool) -> None:
    assert_near(ALL, make_batch(ALL, 2, 3, weighted=weighted), dtype)


@pytest.mark.parametrize("weighted", [False, True])
def test_outputs_and_gradients_are_those_of_the_cpu_kernels(weighted: bool) -> None:
    batch = make_batch(ALL, 2, 3, weighted=weighted, seed=1)
    parameters, grad = ALL.parameters(), upstream(ALL, batch)
    ours, theirs = (run(group, parameters, batch, grad) for group in (ALL.triton(), ALL.cpu()))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shift", range(4))
def test_every_table_steps_as_on_cpu(shift: int) -> None:
    # Neighbours of a family have different optimizers; one table has none.
    kinds: list[Kind | None] = [KINDS[(t + shift + t // 5) % 4] for t in range(len(SHAPES))]
    kinds[shift] = None
    assert_same_steps(ALL, make_batch(ALL, 2, 3, weighted=shift % 2 == 1), kinds)


@pytest.mark.parametrize("left", [0, 1])
def test_a_parameter_that_is_not_stepped_gets_its_gradient(left: int) -> None:
    kinds: list[Kind | None] = [KINDS[(t + t // 5) % 4] for t in range(len(SHAPES))]
    assert_same_steps(ALL, make_batch(ALL, 2, 3), kinds, frozenset({left}))
    offsets = torch.zeros(2 * len(ALL.features) + 1, dtype=torch.int64)
    nothing = Batch(torch.empty(0, dtype=torch.int64), offsets, None, 2)
    assert_same_steps(ALL, nothing, kinds, frozenset({left}))


@pytest.mark.parametrize("kind", [Kind.SGD, Kind.ADAM])
def test_one_optimizer_for_all(kind: Kind) -> None:
    assert_same_steps(ALL, make_batch(ALL, 2, 2), [kind] * len(SHAPES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_of_narrow_types_are_rounded_once(dtype: torch.dtype) -> None:
    batch = make_batch(ALL, 3, 2)
    parameters, grad = ALL.parameters(dtype), upstream(ALL, batch)
    slopes = plain_all(ALL, parameters, batch, grad, torch.float64)[1:]
    exact = [p.double() - 0.5 * slope for p, slope in zip(parameters, slopes, strict=True)]
    run(ALL.triton(dtype), parameters, batch, grad, [Update(Kind.SGD, lr=0.5)] * len(SHAPES))
    for x, y in zip(parameters, exact, strict=True):
        # A unit in the last place: the interpreter cuts bfloat16 off where a GPU rounds.
        rtol = torch.finfo(dtype).eps * (0.51 if dtype == torch.float16 else 1.01)
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=2e-6)


def test_a_product_steps_on_gradients_at_the_old_sides() -> None:
    tables = _tables([RowShape(MULT, (6, 5), (4, 4))])
    batch = make_batch(tables, 6, 3)
    parameters, grad = tables.parameters(), upstream(tables, batch)
    exact = plain_all(tables, parameters, batch, grad, torch.float64)[1:]
    old = [p.clone() for p in parameters]
    run(tables.triton(), parameters, batch, grad, [Update(Kind.SGD, lr=10.0)])
    for x, before, slope in zip(parameters, old, exact, strict=True):
        torch.testing.assert_close(x.double(), before - 10 * slope, rtol=1e-5, atol=1e-4)


def test_ids_outside_a_table_count_for_nothing() -> None:
    batch = make_batch(ALL, 3, 3, weighted=True, seed=2)
    batch.ids[::5] = -1
    batch.ids[2::7] = -(2**40)
    batch.ids[3::11] = 2**40
    assert (batch.ids < 0).sum() > 10
    weights = assert_near(ALL, batch)[-1]
    assert not weights[batch.ids < 0].any()


@pytest.mark.parametrize("size", [0, 3])
def test_batches_without_ids(size: int) -> None:
    offsets = torch.zeros(len(FEATURES) * size + 1, dtype=torch.int64)
    batch = Batch(torch.empty(0, dtype=torch.int64), offsets, torch.empty(0), size)
    parameters = ALL.parameters()
    out, *grads = run(ALL.triton(), parameters, batch, upstream(ALL, batch))
    assert out.shape == (size, ALL.triton().columns)
    assert not any(x.any() for x in (out, *grads))
    assert len(grads) == len(parameters) + 1
    # Steps count, and a projection's Adam goes on by its momentum.
    assert_same_steps(ALL, replace(batch, weights=None), [Kind.ADAM] * len(SHAPES))


def test_tables_that_a_batch_leaves_out() -> None:
    # Families before, between and after those that the ids belong to.
    for present in ((0,), (3,), (len(SHAPES) - 1,), (1, 4)):
        tables = _tables(SHAPES)
        batch = make_batch(tables, 3, 2)
        lengths = torch.tensor([2 * (t in present) for t in range(len(SHAPES)) for _ in range(3)])
        ids = torch.randint(0, 15, (int(lengths.sum()),), generator=torch.Generator().manual_seed(0))
        batch = Batch(ids, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), None, 3)
        assert_near(tables, batch)
        assert_same_steps(tables, batch, [Kind.ADAM] * len(SHAPES))


@pytest.mark.parametrize("rows", [(1, 300), (300, 2), (2, 300), (400, 1)])
@pytest.mark.parametrize("operation", [MULT, CONCAT])
def test_rows_of_one_side_beyond_a_piece(operation: Operation, rows: tuple[int, int]) -> None:
    tables = _tables([RowShape(ROW, (5,), (2,)), RowShape(operation, rows, (3, 3))])
    batch = make_batch(tables, 80, 3, seed=4)
    assert_near(tables, batch)
    assert_same_steps(tables, batch, [None, Kind.SGD])


def test_one_row_beyond_a_piece() -> None:
    tables = _tables([RowShape(ROW, (2,), (3,)), RowShape(PROJECT, (2, 2), (2, 3))])
    batch = make_batch(tables, 50, 6, weighted=True)
    assert_near(tables, batch)
    assert_same_steps(tables, batch, [Kind.ADAM, Kind.ADAM])


def test_rows_wider_than_a_tile() -> None:
    shapes = [
        RowShape(ROW, (7,), (300,)),
        RowShape(MULT, (4, 3), (140, 140)),
        RowShape(CONCAT, (4, 3), (150, 131)),
        RowShape(PROJECT, (9, 130), (130, 150)),
    ]
    tables = _tables(shapes)
    assert_near(tables, make_batch(tables, 3, 3, weighted=True))
    assert_same_steps(tables, make_batch(tables, 3, 3), [Kind.ROWWISE_ADAGRAD] * 4)


def test_any_shape() -> None:
    """In float32 and in one of the narrow types."""
    met: set[object] = set()

    @examples(12)
    @given(
        operation=st.sampled_from(list(Operation)),
        rows=st.tuples(st.integers(1, 20), st.integers(1, 20)),
        widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        sizes=st.tuples(st.integers(1, 5), st.integers(1, 6)),
        weighted=st.booleans(),
        mean=st.booleans(),
        narrow=st.sampled_from(DTYPES[1:]),
        seed=st.integers(0, 99),
    )
    def check(
        operation: Operation,
        rows: tuple[int, int],
        widths: tuple[int, int],
        sizes: tuple[int, int],
        weighted: bool,
        mean: bool,
        narrow: torch.dtype,
        seed: int,
    ) -> None:
        if operation in (MULT, ADD):
            widths = (widths[0], widths[0])
        elif operation == PROJECT:
            rows = (rows[0], widths[0])
        parts = 1 if operation == ROW else 2
        shape = RowShape(operation, rows[:parts], widths[:parts])
        tables = _tables([shape], [FeatureCode(0, mean), FeatureCode(0, not mean)])
        batch = make_batch(tables, *sizes, weighted=weighted, seed=seed)
        for dtype in (torch.float32, narrow):
            assert_near(tables, batch, dtype)
            assert_same_steps(tables, batch, [KINDS[seed % 4]], dtype=dtype)
        met.update(kinds_of_bags(batch), {operation, narrow})

    check()
    assert met == {"empty", "an id twice", *Operation, *DTYPES[1:]}


def test_the_bits_of_two_runs_and_no_waiting_for_the_device() -> None:
    assert_bits_without_waiting(ALL, make_batch(ALL, 2, 3, weighted=True))


def test_the_bits_of_a_row_that_programs_share() -> None:
    """Its places are seven pieces, of which a program takes four."""
    tables = _tables([RowShape(ROW, (9,), (128,))])
    ids = torch.cat((torch.arange(9), torch.full((411,), 7)))
    assert_bits_without_waiting(tables, Batch(ids, torch.arange(0, 421, 10), None, 42))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    assert_nothing_steps(ALL, make_batch(ALL, 2, 2), value)


def test_a_refused_batch_changes_nothing() -> None:
    refused = torch.ones(1, dtype=torch.int32)
    assert_nothing_steps(ALL, replace(make_batch(ALL, 2, 2), refused=refused), 1.0)


def test_offsets_that_are_refused_read_nothing_else() -> None:
    assert_offsets_stay_in_bounds(ALL)
