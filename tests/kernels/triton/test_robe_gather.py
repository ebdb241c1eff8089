"""Blocks of shared arrays by Triton kernels, against plain torch and the CPU's kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recemb.id_maps.hashing import MERSENNE_61, UniversalHash
from recemb_kernels.digit_tree.group import Batch, FeatureCode
from recemb_kernels.robe_gather import RobeShape, robe_gather
from recemb_kernels.robe_gather.triton_kernel import hash_row, place
from recemb_kernels.update import Kind, Update
from tests.kernels.triton.examples import examples
from tests.kernels.triton.harness import (
    DEVICE,
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

# Rows of the last table of an array, which may be as many as hashes can tell apart.
LAST = 2**57
_HASHES = [UniversalHash.from_seed(7, purpose) for purpose in ("slot", "sign")]


@cache
def _shape(
    dim: int, block_size: int, rows: int, signed: bool, key_bases: tuple[int, ...] = (0,), last: int = LAST
) -> RobeShape:
    slot, sign = _HASHES
    blocks = -(-dim // block_size)
    offsets = [x for table in range(len(key_bases)) for h in _HASHES for x in h.offsets(1 + table, blocks)]
    hashes, num_keys = ((slot.b, slot.q), (sign.b, sign.q)), key_bases[-1] + last
    return RobeShape(dim, block_size, rows, signed, *hashes, key_bases, tuple(offsets), num_keys)


def _rows(shape: RobeShape, parameters: Sequence[Tensor], keys: Tensor) -> Tensor:
    blocks, size = -(-shape.dim // shape.block_size), shape.rows * shape.block_size
    bases = torch.tensor(shape.key_bases)
    table = torch.searchsorted(bases, keys, right=True) - 1
    each = [
        torch.stack([h.blocks(1 + t, keys - bases[table], blocks) for t in range(len(bases))])
        for h in _HASHES
    ]
    starts, signs = (x[table, torch.arange(len(keys))] for x in each)
    column = torch.arange(shape.dim)
    block = column // shape.block_size
    values = parameters[0].flatten()[(starts[:, block] % size + column % shape.block_size) % size]
    return torch.where((signs[:, block] & 1 == 1) & shape.signed, -values, values)


def _tables(shapes: Sequence[RobeShape], features: Sequence[FeatureCode]) -> Tables:
    return Tables(
        robe_gather,
        _rows,
        lambda shape: [(shape.rows, shape.block_size)],
        shapes,
        features,
    )


SHAPES = (
    # Two arrays of one family, the first shared by two tables; blocks that do not divide the dim.
    _shape(7, 3, 6, True, (0, 30)),
    _shape(7, 3, 9, True),
    # Rows of one block that is longer than they are.
    _shape(6, 16, 4, False, (0, 10, 40)),
    # The array is a single block, which every row goes around.
    _shape(16, 16, 1, True),
    _shape(5, 1, 11, False),
    # More array rows than the batch touches.
    _shape(9, 4, 400, True),
)
FEATURES = (
    *(FeatureCode(0, False, 0), FeatureCode(0, True, 30), FeatureCode(1, False), FeatureCode(2, True, 10)),
    *(FeatureCode(2, False, 0), FeatureCode(2, False, 40), FeatureCode(3, False), FeatureCode(4, False)),
    *(FeatureCode(5, False), FeatureCode(5, True), FeatureCode(1, True)),
)
ALL = _tables(SHAPES, FEATURES)


@triton.jit
def _hashes(out, ids, linear, square, offsets, sizes, reciprocals, N: tl.constexpr):  # noqa: ANN202
    n = tl.arange(0, N)
    hashed = hash_row(tl.load(ids + n), tl.load(linear + n), tl.load(square + n))
    placed = place(hashed, tl.load(offsets + n), tl.load(sizes + n), tl.load(reciprocals + n))
    tl.store(out + n, placed)


@examples(20)
@given(st.lists(st.integers(0, MERSENNE_61 - 1), min_size=32, max_size=32), st.integers(0, 60))
def test_hashes_are_exact(numbers: list[int], bits: int) -> None:
    last = MERSENNE_61 - 1
    columns = [[last, 0, 1, last, *numbers[i:], *numbers[:i]][:32] for i in range(4)]
    sizes = [1, 1, last, 3, *(1 + n % 2**bits for n in reversed(numbers))][:32]
    ids, linear, square, offsets = columns
    out = torch.empty(32, dtype=torch.int64, device=DEVICE)
    arguments = [*columns, sizes, [2**61 // size for size in sizes]]
    _hashes[(1,)](out, *(torch.tensor(each, device=DEVICE) for each in arguments), N=32)
    assert out.tolist() == [
        (q * x * x + b * x + o) % MERSENNE_61 % size
        for x, b, q, o, size in zip(ids, linear, square, offsets, sizes, strict=True)
    ]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_are_those_of_plain_torch(dtype: torch.dtype, weighted: bool) -> None:
    assert_near(ALL, make_batch(ALL, 2, 3, weighted=weighted, most=50), dtype)


@pytest.mark.parametrize("most", [40, LAST])
def test_outputs_and_gradients_are_those_of_the_cpu_kernels(most: int) -> None:
    batch = make_batch(ALL, 2, 3, weighted=most == 40, seed=1, most=most)
    parameters, grad = ALL.parameters(), upstream(ALL, batch)
    ours, theirs = (run(group, parameters, batch, grad) for group in (ALL.triton(), ALL.cpu()))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shift", range(4))
def test_every_array_steps_as_on_cpu(shift: int) -> None:
    # The two arrays of a family have different optimizers; one array has none.
    kinds: list[Kind | None] = [KINDS[(t + shift) % 4] for t in range(len(SHAPES))]
    kinds[shift] = None
    assert_same_steps(ALL, make_batch(ALL, 2, 2, weighted=shift % 2 == 1, most=60), kinds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_of_narrow_types_are_rounded_once(dtype: torch.dtype) -> None:
    batch = make_batch(ALL, 2, 2, most=60)
    parameters, grad = ALL.parameters(dtype), upstream(ALL, batch)
    slopes = plain_all(ALL, parameters, batch, grad, torch.float64)[1:]
    exact = [p.double() - 0.5 * slope for p, slope in zip(parameters, slopes, strict=True)]
    run(ALL.triton(dtype), parameters, batch, grad, [Update(Kind.SGD, lr=0.5)] * len(SHAPES))
    for x, y in zip(parameters, exact, strict=True):
        # A unit in the last place: the interpreter cuts bfloat16 off where a GPU rounds.
        rtol = torch.finfo(dtype).eps * (0.51 if dtype == torch.float16 else 1.01)
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=2e-6)


def test_ids_outside_a_table_count_for_nothing() -> None:
    batch = make_batch(ALL, 3, 3, weighted=True, seed=2, most=50)
    batch.ids[::5] = -1
    batch.ids[2::7] = -(2**40)
    batch.ids[3::11] = LAST
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
    # Steps count.
    assert_same_steps(ALL, replace(batch, weights=None), [Kind.ADAM] * len(SHAPES))


@pytest.mark.parametrize("present", [(0,), (2,), (5,), (1, 4)])
def test_arrays_that_a_batch_leaves_out(present: tuple[int, ...]) -> None:
    tables = _tables(SHAPES, [FeatureCode(t, False) for t in range(len(SHAPES))])
    lengths = torch.tensor([2 * (t in present) for t in range(len(SHAPES)) for _ in range(3)])
    ids = torch.randint(0, 10, (int(lengths.sum()),), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), None, 3)
    assert_near(tables, batch)
    assert_same_steps(tables, batch, [Kind.ADAM] * len(SHAPES))


@pytest.mark.parametrize(("dim", "block_size", "rows"), [(6, 2, 3), (4, 4, 2), (3, 8, 1)])
def test_array_rows_with_more_blocks_than_a_piece(dim: int, block_size: int, rows: int) -> None:
    tables = _tables([_shape(dim, block_size, rows, True)], [FeatureCode(0, False)])
    batch = make_batch(tables, 60, 4, seed=4, most=2**40)
    assert_near(tables, batch)
    assert_same_steps(tables, batch, [Kind.ADAGRAD])


def test_blocks_wider_than_a_tile() -> None:
    shapes = [_shape(300, 150, 4, True), _shape(140, 1, 200, True), _shape(20, 200, 3, False)]
    tables = _tables(shapes, [FeatureCode(t, t == 0) for t in range(3)])
    batch = make_batch(tables, 2, 3, weighted=True, most=99)
    assert_near(tables, batch)
    assert_same_steps(tables, batch, [Kind.SGD, None, Kind.ADAM])


def test_any_shape() -> None:
    """In float32 and in one of the narrow types."""
    met: set[object] = set()

    @examples(8)
    @given(
        sizes=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)),
        signed=st.booleans(),
        batch_sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        weighted=st.booleans(),
        mean=st.booleans(),
        narrow=st.sampled_from(DTYPES[1:]),
        seed=st.integers(0, 99),
    )
    def check(
        sizes: tuple[int, int, int],
        signed: bool,
        batch_sizes: tuple[int, int],
        weighted: bool,
        mean: bool,
        narrow: torch.dtype,
        seed: int,
    ) -> None:
        dim, block_size, rows = sizes
        # An array is no smaller than a row.
        shape = _shape(dim, block_size, max(rows, -(-dim // block_size)), signed, (0, 5))
        tables = _tables([shape], [FeatureCode(0, mean, 5), FeatureCode(0, not mean)])
        batch = make_batch(tables, *batch_sizes, weighted=weighted, seed=seed, most=30)
        for dtype in (torch.float32, narrow):
            assert_near(tables, batch, dtype)
            assert_same_steps(tables, batch, [KINDS[seed % 4]], dtype=dtype)
        met.update(kinds_of_bags(batch), {signed, narrow})

    check()
    assert met == {"empty", "an id twice", True, False, *DTYPES[1:]}


def test_rows_beyond_the_arrays_last_are_skipped() -> None:
    tables = _tables(
        [_shape(3, 2, 5, True, (0, 9), 4), SHAPES[1]], [FeatureCode(0, False, 9), FeatureCode(1, False)]
    )
    batch = make_batch(tables, 3, 3, weighted=True)
    batch.ids[::2] += 4
    assert_near(tables, batch)
    with pytest.raises(OverflowError, match="are more than 2\\*\\*62"):
        _tables([_shape(3, 2, 5, True, (0, 2**62), 4)], [FeatureCode(0, False)]).triton()


def test_the_bits_of_two_runs_and_no_waiting_for_the_device() -> None:
    assert_bits_without_waiting(ALL, make_batch(ALL, 2, 2, weighted=True, most=50))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    assert_nothing_steps(ALL, make_batch(ALL, 2, 2, most=50), math.nan)


def test_a_refused_batch_changes_nothing() -> None:
    refused = torch.ones(1, dtype=torch.int32)
    assert_nothing_steps(ALL, replace(make_batch(ALL, 2, 2, most=50), refused=refused), 1.0)


def test_offsets_that_are_refused_read_nothing_else() -> None:
    assert_offsets_stay_in_bounds(ALL)
