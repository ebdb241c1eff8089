"""Tensor-train tables by Triton kernels, against float64, plain torch and the CPU's kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recemb.id_maps.radix import mixed_radix
from recemb_kernels import triton_frame
from recemb_kernels.digit_tree.group import Batch, FeatureCode
from recemb_kernels.triton_frame import slice_rows, turn_rows
from recemb_kernels.triton_frame.family import MICRO_BATCH_ROWS
from recemb_kernels.tt_gather import TrainShape, triton_train, tt_gather
from recemb_kernels.tt_gather.triton_variants import MOST_PROGRAMS, Tiles, product_of
from recemb_kernels.update import Kind
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
    run,
    upstream,
)

# Two families: two tables of one (q, R) with different p, and a third of another order.
SHAPES = (
    TrainShape((9, 8, 7), (2, 2, 4), (1, 16, 8, 1)),
    TrainShape((21, 24), (2, 4), (1, 8, 1)),
    TrainShape((5, 4, 11), (2, 2, 4), (1, 16, 8, 1)),
)


def _rows(shape: TrainShape, cores: Sequence[Tensor], keys: Tensor) -> Tensor:
    slots = mixed_radix(keys, shape.row_shape)
    product = cores[0][slots[:, 0]].view(len(keys), shape.dim_shape[0], shape.ranks[1])
    for k in range(1, len(cores)):
        core = cores[k][slots[:, k]].view(len(keys), shape.ranks[k], shape.dim_shape[k] * shape.ranks[k + 1])
        product = (product @ core).view(len(keys), math.prod(shape.dim_shape[: k + 1]), shape.ranks[k + 1])
    return product.squeeze(2)


def _sizes(shape: TrainShape) -> list[tuple[int, int]]:
    bonds = zip(shape.row_shape, shape.dim_shape, shape.ranks, shape.ranks[1:], strict=False)
    return [(p, r * q * s) for p, q, r, s in bonds]


def _tables(shapes: Sequence[TrainShape], features: Sequence[FeatureCode] | None = None) -> Tables:
    codes = [FeatureCode(t, t == 1) for t in range(len(shapes))] if features is None else features
    return Tables(
        tt_gather,
        _rows,
        _sizes,
        shapes,
        codes,
        std=lambda shape: math.prod(shape.ranks) ** (-0.5 / len(shape.row_shape)),
        narrows=True,
    )


ALL = _tables(SHAPES)
# The same with narrow products: rows' shares of their gradients are stored on the way back.
STORED = _tables(
    [replace(s, dim_shape=(*[1] * (len(s.dim_shape) - 1), s.dim_shape[-1])) for s in SHAPES],
)
BOTH = pytest.mark.parametrize("tables", [ALL, STORED], ids=["computed shares", "stored shares"])


def test_shares_of_both_kinds() -> None:
    assert not any(shape.stores_shares for shape in ALL.shapes)
    assert all(shape.stores_shares for shape in STORED.shapes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@BOTH
def test_outputs_and_gradients_are_those_of_plain_torch(
    tables: Tables, dtype: torch.dtype, weighted: bool
) -> None:
    assert_near(tables, make_batch(tables, 5, 3, weighted=weighted), dtype)


@pytest.mark.parametrize(
    "shape",
    [
        TrainShape((30, 20), (1, 3), (1, 4, 1)),
        TrainShape((6, 5, 7), (4, 4, 8), (1, 128, 64, 1)),
        TrainShape((4, 3, 5, 3), (2, 2, 2, 2), (1, 4, 8, 4, 1)),
        TrainShape((7, 1, 9), (1, 1, 1), (1, 1, 3, 1)),
        TrainShape((7, 6, 5), (3, 5, 1), (1, 13, 11, 1)),
        TrainShape((1, 1, 1), (1, 1, 1), (1, 1, 1, 1)),
        TrainShape((5, 7, 3, 2), (1, 1, 1, 33), (1, 5, 100, 7, 1)),
        TrainShape((2, 3, 2, 3), (2, 2, 2, 3), (1, 128, 128, 128, 1)),
    ],
    ids=lambda s: "x".join(map(str, s.ranks)),
)
def test_ranks_orders_and_odd_sizes(shape: TrainShape) -> None:
    tables = _tables([shape])
    batch = make_batch(tables, 6, 2, seed=1)
    for dtype in DTYPES:
        assert_near(tables, batch, dtype)


@pytest.mark.parametrize(
    ("rank", "dtype"), [(4, torch.float16), (32, torch.bfloat16), (32, torch.float32), (128, torch.float32)]
)
@pytest.mark.parametrize("split", [(4, 4), (2, 2, 4), (2, 2, 2, 2)], ids=len)
def test_every_order_and_rank_pools(split: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    """Sums and means of weighted rows; and steps as on the CPU."""
    shape = TrainShape((3,) * len(split), split, (1, *[rank] * (len(split) - 1), 1))
    tables = _tables([shape], [FeatureCode(0, False), FeatureCode(0, True)])
    batch = make_batch(tables, 3, 2, weighted=True)
    assert_near(tables, batch, dtype)
    if (rank, dtype) == (32, torch.float32):
        assert_same_steps(tables, batch, [Kind.ROWWISE_ADAGRAD])


def test_any_shape() -> None:
    """Ranks on both sides of the 8 from which a product is a ``tl.dot``; of both there is an example.

    Trains of two cores step as on the CPU too: to compile the CPU's kernels of more takes long.
    """
    met: set[object] = set()

    @examples(9)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        order = data.draw(st.integers(2, 4))
        sizes = st.integers(1, 6)
        rows, split = ([data.draw(sizes) for _ in range(order)] for _ in range(2))
        if math.prod(split) > 64:
            split = [2] * order
        bonds = data.draw(st.sampled_from([st.integers(1, 7), st.integers(8, 13)]))
        ranks = [data.draw(bonds) for _ in range(order - 1)]
        shape = TrainShape(tuple(rows), tuple(split), (1, *ranks, 1))
        tables = _tables(
            [shape, SHAPES[0]],
            [FeatureCode(0, data.draw(st.booleans())), FeatureCode(1, False), FeatureCode(0, False)],
        )
        batch = make_batch(
            tables,
            data.draw(st.integers(1, 5)),
            data.draw(st.integers(1, 3)),
            weighted=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 2**20)),
        )
        dtype, at_once = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([2, 5, 2**15]))
        assert_near(tables, batch, dtype, at_once)
        met.update(kinds_of_bags(batch), {order, dtype})
        if batch.ids.numel():
            met.update(Tiles.of(*product_of(shape, k)[1:]).dot for k in range(1, order))
        if order == 2:
            alone, kinds = _tables([shape]), [KINDS[batch.ids.numel() % 4]]
            batch = make_batch(alone, batch.size, 3, weighted=True)
            for each in DTYPES:
                assert_same_steps(alone, batch, kinds, micro_batch_rows=at_once, dtype=each)

    check()
    assert met == {"empty", "an id twice", True, False, 2, 3, 4, *DTYPES}


def test_products_from_eight_on_are_dots() -> None:
    """Of K and N alike; both ways are exact, so that only the time would tell."""
    assert all(Tiles.of(k, n).dot for k, n in ((8, 8), (8, 100), (100, 8)))
    assert not any(Tiles.of(k, n).dot for k, n in ((7, 7), (7, 100), (100, 7)))
    assert Tiles.of(8, 9) == Tiles(True, 16, 16), "padded to what tl.dot takes"


@pytest.mark.parametrize("micro_batch_rows", [5, MICRO_BATCH_ROWS])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_table_steps_as_on_cpu(kind: Kind, micro_batch_rows: int) -> None:
    """Once, though each family's distinct rows, 15 and 13, come in three slices."""
    batch = make_batch(ALL, 6, 3)
    assert_same_steps(ALL, batch, [kind] * 3, micro_batch_rows=micro_batch_rows)


def test_narrow_trains_step_as_on_cpu() -> None:
    assert_same_steps(STORED, make_batch(STORED, 6, 3), [Kind.ADAGRAD] * 3, micro_batch_rows=5)


def test_tables_with_their_own_rules_and_without() -> None:
    """Different rules in one family: each table takes its own, and the last gives gradients."""
    assert_same_steps(ALL, make_batch(ALL, 6, 3), [Kind.ADAGRAD, Kind.ADAM, None])
    assert_same_steps(ALL, make_batch(ALL, 4, 3), [Kind.ADAGRAD, None, Kind.SGD])
    assert_same_steps(ALL, make_batch(ALL, 4, 3), [Kind.ADAM, None, Kind.SGD], frozenset({1}))


@pytest.mark.parametrize("kinds", [[Kind.ADAGRAD] * 3, [Kind.ADAM, Kind.SGD, Kind.ROWWISE_ADAGRAD]])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_steps_in_float32(dtype: torch.dtype, kinds: list[Kind]) -> None:
    """In several slices."""
    assert_same_steps(ALL, make_batch(ALL, 6, 3), kinds, micro_batch_rows=5, dtype=dtype)


@pytest.mark.parametrize(("size", "micro_batch_rows"), [(4, (2, 7)), (70, (100,))], ids=["parts", "one part"])
@BOTH
def test_micro_batches_give_the_bits_of_the_whole(
    tables: Tables, size: int, micro_batch_rows: Sequence[int]
) -> None:
    """The families have 92 and 21 prefixes: with fewer rows at once micro-batches have nodes of their own."""
    batch = make_batch(tables, size, 3, weighted=True)
    parameters, grad = tables.parameters(), upstream(tables, batch)
    whole = run(tables.triton(), parameters, batch, grad)
    for rows in micro_batch_rows:
        sliced = run(tables.triton(micro_batch_rows=rows), parameters, batch, grad)
        assert torch.equal(whole[0], sliced[0])
        assert torch.equal(whole[-1], sliced[-1]), "gradients of the weights"
        # A core slice sums over the same nodes, and a node over its rows, in another order.
        for first, second in zip(whole[1:-1], sliced[1:-1], strict=True):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("weighted", [False, True])
@BOTH
def test_bags_take_rows_in_turns(tables: Tables, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 distinct rows each. Sums, and means, which the last one divides, have the same bits whatever the
    micro-batches; where these are no powers of two, fewer rows are computed at once.
    """
    monkeypatch.setattr(triton_frame, "TURN_ROWS", 4)
    batch = make_batch(tables, 14, 2, weighted=weighted)
    count = batch.ids.numel()
    assert turn_rows(count) == 16
    assert count > 2 * 16
    parameters, grad = tables.parameters(), upstream(tables, batch)
    whole = run(tables.triton(), parameters, batch, grad)
    for rows in (2, 7, 16, 40):
        assert torch.equal(assert_near(tables, batch, micro_batch_rows=rows)[0], whole[0])
    monkeypatch.setattr(triton_frame, "TURN_ROWS", 64)
    torch.testing.assert_close(run(tables.triton(), parameters, batch, grad)[0], whole[0])


@pytest.mark.parametrize("without", [(0,), (2,), (1,), (0, 1, 2)], ids=str)
def test_turns_of_tables_without_rows(without: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last of a family, a family that has nothing, and all: their bags are zero."""
    monkeypatch.setattr(triton_frame, "TURN_ROWS", 4)
    batch = make_batch(ALL, 14, 2)
    for f in without:
        batch.ids[batch.offsets[14 * f] : batch.offsets[14 * (f + 1)]] = -1
    for rows in (4, MICRO_BATCH_ROWS):
        out = assert_near(ALL, batch, micro_batch_rows=rows)[0]
        columns = [out[:, :16], out[:, 16:24], out[:, 24:]]
        assert [bool(own.any()) for own in columns] == [f not in without for f in range(3)]


def test_a_turn_with_one_row_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """And others with a whole table's: of 17 rows and 20, by 16."""
    monkeypatch.setattr(triton_frame, "TURN_ROWS", 4)
    tables = _tables([SHAPES[0], SHAPES[2]], [FeatureCode(0, True), FeatureCode(1, False)])
    ids = torch.cat((torch.arange(17) * 3, torch.arange(20) * 2))
    batch = Batch(ids, torch.cat((torch.arange(17), torch.full((3,), 17), torch.arange(17, 38))), None, 20)
    assert turn_rows(len(ids)) == 16
    for rows in (4, MICRO_BATCH_ROWS):
        assert bool(assert_near(tables, batch, micro_batch_rows=rows)[0][:17].any(1).all())


def test_turns_are_of_a_batch_and_slices_end_with_them() -> None:
    for count in (1, 2**17, 2**17 + 1, 2**19, 2**19 + 1, 26 * 65_536, 2**30):
        rows = turn_rows(count)
        assert -(-count // rows) <= 4
        for own in (1, 1000, 2**16, 300_000, 2**31 - 1):
            computed = slice_rows(count, own)
            assert own // 2 < computed <= own
            assert count <= rows or rows % computed == 0 or computed % rows == 0


def test_every_table_steps_where_one_part_has_several_micro_batches() -> None:
    assert_same_steps(ALL, make_batch(ALL, 70, 3), [Kind.ADAGRAD] * 3, micro_batch_rows=100)


@pytest.mark.parametrize(("micro_batch_rows", "programs"), [(100, 3), (MICRO_BATCH_ROWS, MOST_PROGRAMS)])
@pytest.mark.parametrize("last", [2, 3])
def test_nodes_with_more_rows_than_a_piece(
    last: int, micro_batch_rows: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of three tables: nodes of 180 and 70 rows, and of 64, which begin and end at a cut.

    Three programs take turns; nodes have rows in several micro-batches.
    """
    monkeypatch.setattr(triton_train, "MOST_PROGRAMS", programs)
    first = 4 - last  # a row of 3 columns stores its share
    split, ranks = (first, 1, last), (1, 2, 3, 1)
    shapes = [TrainShape((1, 1, 180), split, ranks), TrainShape((1, 2, 70), split, ranks)]
    tables = _tables([*shapes, TrainShape((2, 64), (first, last), (1, 3, 1))])
    assert {shape.stores_shares for shape in tables.shapes} == {last == 3}
    ids = torch.arange(180)
    batch = Batch(torch.cat((ids, ids % 140, ids % 128)), torch.arange(541), None, 180)
    assert_near(tables, batch, micro_batch_rows=micro_batch_rows)


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 3])
@pytest.mark.parametrize("split", [(2, 1, 2), (1, 1, 3)], ids=str)
def test_micro_batches_that_begin_within_a_prefix(split: tuple[int, ...], micro_batch_rows: int) -> None:
    """A node more for each of one or two rows: of trains with one prefix and with two, behind another
    family's rows. Three can have all prefixes: nodes then have rows in several."""
    shapes = [
        SHAPES[1],
        TrainShape((1, 1, 9), split, (1, 2, 3, 1)),
        TrainShape((2, 1, 5), split, (1, 2, 3, 1)),
    ]
    tables = _tables(shapes)
    ids = torch.tensor([3, 40, 3, -1, 8, 2, 0, 1, 7, 6, 8, 5, 9, 4, 0, 1, 2, 3])
    batch = Batch(ids, torch.arange(0, 19, 2), None, 3)
    assert_near(tables, batch, micro_batch_rows=micro_batch_rows)


def test_one_row_beyond_a_piece() -> None:
    """In two features."""
    tables = _tables(SHAPES[:1], [FeatureCode(0, False), FeatureCode(0, True)])
    batch = make_batch(tables, 100, 1)
    batch.ids.fill_(5)
    assert_near(tables, batch)


@pytest.mark.parametrize("size", [0, 4])
def test_batches_without_ids(size: int) -> None:
    offsets = torch.zeros(3 * size + 1, dtype=torch.int64)
    batch = Batch(torch.empty(0, dtype=torch.int64), offsets, None, size)
    out, *grads = run(ALL.triton(), ALL.parameters(), batch, upstream(ALL, batch))
    assert torch.equal(out, torch.zeros(size, sum(s.dim for s in SHAPES)))
    assert all(torch.equal(g, torch.zeros_like(p)) for g, p in zip(grads, ALL.parameters(), strict=True))
    assert_same_steps(ALL, batch, [Kind.ADAM] * 3)


def test_ids_outside_a_table_count_for_nothing() -> None:
    """Negative ones mean that; others are refused by the check, and must not be read before that."""
    batch = make_batch(ALL, 6, 2, weighted=True)
    bad = torch.arange(batch.ids.numel()) % 3 == 0
    batch.ids[bad] = torch.where(torch.arange(int(bad.sum())) % 2 == 0, -1, 2**40)
    assert not assert_near(ALL, batch)[-1][bad].any()


def test_more_rows_than_an_int32_counts() -> None:
    tables = _tables([TrainShape((2**14, 2**10, 2**10), (2, 1, 2), (1, 2, 2, 1))])
    batch = make_batch(tables, 6, 2)
    batch.ids[:3] = torch.tensor([2**34 - 1, 2**31, 2**33 + 5])
    assert_near(tables, batch)


def test_the_bits_of_two_runs_and_no_waiting_for_the_device() -> None:
    assert_bits_without_waiting(ALL, make_batch(ALL, 4, 3, weighted=True))


def test_the_bits_of_a_prefix_that_programs_share() -> None:
    """Its rows are three pieces."""
    tables = _tables([TrainShape((1, 1, 130), (1, 1, 2), (1, 2, 3, 1))])
    assert_bits_without_waiting(tables, Batch(torch.arange(130), torch.arange(131), None, 130))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    assert_nothing_steps(ALL, make_batch(ALL, 3, 3), math.inf)


def test_a_refused_batch_changes_nothing() -> None:
    refused = torch.ones(1, dtype=torch.int32)
    assert_nothing_steps(ALL, replace(make_batch(ALL, 3, 3), refused=refused), 1.0)


def test_offsets_that_are_refused_read_nothing_else() -> None:
    assert_offsets_stay_in_bounds(ALL)
