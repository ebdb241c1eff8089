"""Plans of a batch: slices, mirrors, tables that all threads plan, and those that are one thread's."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recemb.backends import build
from recemb.backends.native import pooled_native
from recemb.backends.tt_shapes import table_shapes
from recemb.bags import Bags
from recemb.spec import ROBE, Compression, Dense, QuotientRemainder, TableSpec, TensorTrain
from recemb_kernels.digit_tree.group import Batch, FeatureCode, Group, driver
from recemb_kernels.tt_gather import TrainShape, tt_gather
from tests.kernels.cases import (
    group_of,
    make_bags,
    make_engine,
    make_kernels,
    run_trains,
    step_all,
    train_batch,
)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    batch=st.integers(1, 60),
    longest=st.integers(1, 5),
    weighted=st.booleans(),
    mirrored=st.booleans(),
    rows=st.sampled_from([1, 3, 16, 100]),
    seed=st.integers(0, 2**31),
)
def test_slices_give_the_bits_of_the_whole(
    batch: int, longest: int, weighted: bool, mirrored: bool, rows: int, seed: int
) -> None:
    cores, bags, grad = train_batch(batch, longest, weighted, seed)
    _assert_slices_agree(cores, bags, grad, mirrored, rows, atol=2e-5)


@pytest.mark.parametrize("mirrored", [False, True])
def test_slices_give_the_bits_of_the_whole_where_gradients_fill_a_cache(mirrored: bool) -> None:
    cores, bags, grad = train_batch(700, 2, False, 1)
    assert grad.nbytes > 2**20
    _assert_slices_agree(cores, bags, grad, mirrored, rows=100, atol=1e-4)


def _assert_slices_agree(
    cores: list[Tensor], bags: Batch, grad: Tensor, mirrored: bool, rows: int, atol: float
) -> None:
    kernels = [kernel for _, kernel in make_kernels(mirrored)]
    whole = run_trains(kernels, cores, bags, grad)
    sliced = run_trains(kernels, cores, bags, grad, micro_batch_rows=rows)
    for first, second in zip(whole[:1], sliced[:1], strict=True):
        assert torch.equal(first, second)
    # A core slice sums over the same nodes in another order of chains.
    for first, second in zip(whole[1:], sliced[1:], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=atol)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(longest=st.integers(1, 4), weighted=st.booleans(), seed=st.integers(0, 2**31))
def test_a_train_reads_the_same_from_either_end(longest: int, weighted: bool, seed: int) -> None:
    cores, bags, grad = train_batch(40, longest, weighted, seed)
    straight = run_trains([kernel for _, kernel in make_kernels(False)], cores, bags, grad)
    mirrored = run_trains([kernel for _, kernel in make_kernels(True)], cores, bags, grad)
    for first, second in zip(straight, mirrored, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_the_mirror_is_taken_when_suffixes_are_shared() -> None:
    """Ids a * 56 + b with one b: 40 prefixes (i_1, i_2) but a single suffix (i_2, i_3)."""
    shape = TrainShape((40, 8, 7), (2, 2, 2), (1, 8, 8, 1))
    kernel = tt_gather.kernel(shape)
    torch.manual_seed(0)
    cores = [torch.randn(p, r * 2 * s) for p, r, s in ((40, 1, 8), (8, 8, 8), (7, 8, 1))]
    ids = torch.arange(40) * 56 + 17
    batch = Batch(ids, torch.arange(41), None, 40)
    chosen = Group([kernel], [FeatureCode(0, False)])
    never = Group([replace(kernel, mirrored_cost=())], [FeatureCode(0, False)])
    outs = [group.forward(cores, batch, keep=False)[0] for group in (chosen, never)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    assert not torch.equal(*outs), "both were read from the same end"


@pytest.mark.parametrize(
    ("ids_of", "rows_of", "hot", "tables_of"),
    [
        ((40_000,), 10**6, 0.0, 1),
        ((17_000, 40_000, 100), 10**6, 0.0, 3),
        ((17_000, 30_000), 10**6, 0.3, 1),
        ((40_000,), 10**10, 0.5, 1),
        ((40_000,), 10**6, 1.0, 1),
    ],
)
def test_large_tables_are_planned_by_all_threads_to_the_same_bits(
    ids_of: tuple[int, ...], rows_of: int, hot: float, tables_of: int, set_threads: Callable[[int], None]
) -> None:
    """The largest of several, or by one each where they are many; one of several features; wide keys; an id
    that is all of a thread's share, or of the table's.
    """
    spec = TableSpec(
        name="t", num_embeddings=rows_of, embedding_dim=16, compression=TensorTrain(rank=4), init_std=1.0
    )
    specs = [replace(spec, name=f"t{f}", feature_names=(f"f{f}",)) for f in range(tables_of)]
    torch.manual_seed(0)
    tables = list(build(specs, torch.device("cpu")).values())
    features = tables if tables_of == len(ids_of) else tables * len(ids_of)
    for table in tables:
        table.reset_parameters()
    parameters = [parameter for table in tables for parameter in table.parameters()]
    lengths = torch.cat([(torch.arange(40_000) < count).long() for count in ids_of])
    ids = (torch.rand(sum(ids_of), dtype=torch.float64) ** 3 * rows_of).long()
    ids[torch.rand(len(ids)) < hot] = rows_of // 2
    bags = Bags(ids, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), len(ids_of))
    outcomes = []
    for count in (1, 2, 3, 70):
        set_threads(count)
        pooled = pooled_native(features, bags)
        assert pooled is not None
        outcomes.append([pooled.detach(), *torch.autograd.grad(pooled.square().sum(), parameters)])
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))
    rows = tables[0].rows(tables[0].map_ids(ids[:100]))
    torch.testing.assert_close(outcomes[0][0][:100, :16], rows, rtol=1e-5, atol=1e-6)
    assert math.prod(table_shapes(spec)[0]) >= rows_of


@pytest.mark.parametrize(
    ("rows", "compression"),
    [
        (2**20, Dense()),
        # More values of a digit than are counted.
        (10**8, TensorTrain(rank=2, row_shape=(200, 50_000, 10), dim_shape=(1, 1, 2))),
        (10**6, QuotientRemainder(collisions=5000)),
        (2**60 - 1, ROBE(compress_rate=2**56, block_size=1)),
    ],
)
@pytest.mark.parametrize("kind", ["any", "hot", "two"])
def test_all_threads_plan_as_one_does(
    rows: int, compression: Compression, kind: str, set_threads: Callable[[int], None]
) -> None:
    """Of any number of digits; also of ids that ranges are hard to cut between: doubles do not hold them."""
    spec = TableSpec(
        name="t",
        num_embeddings=rows,
        embedding_dim=2,
        compression=compression,
        feature_names=("f",),
        init_std=1.0,
    )
    torch.manual_seed(1)
    ids = (torch.rand(8256, dtype=torch.float64) ** (9 if kind == "hot" else 1) * rows).long()
    ids.clamp_(max=rows - 1)
    if kind == "two":
        ids = torch.cat([torch.full((903,), (rows + 1) // 2), torch.full((8256 - 903,), rows - 1)])
    outcomes = []
    for count in (1, 2, 6, 7):
        set_threads(count)
        torch.manual_seed(0)
        tables = build([spec], torch.device("cpu"))
        tables["t"].reset_parameters()
        step_all(tables, torch.optim.SGD, 0.1)
        pooled = pooled_native([tables["t"]], Bags(ids, torch.arange(len(ids) + 1), 1))
        assert pooled is not None
        pooled.square().sum().backward()
        outcomes.append([tensor.detach() for tensor in (pooled, *tables["t"].parameters())])
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize(
    ("rows_of", "dim", "train"),
    [
        (10**6, 16, TensorTrain(rank=16)),
        (10**6, 8, TensorTrain(rank=4, dim_shape=(2, 2, 2))),
        (10**6, 16, TensorTrain(rank=4, num_cores=2)),
        (10**6, 4, TensorTrain(rank=3, num_cores=4)),
    ],
)
@pytest.mark.parametrize(
    ("longest", "weighted", "micro_batch_rows"), [(1, False, 2**13), (1, True, 2**14), (2, True, 2**13)]
)
def test_tables_in_parts_come_out_with_the_same_bits(
    rows_of: int,
    dim: int,
    train: TensorTrain,
    longest: int,
    weighted: bool,
    micro_batch_rows: int,
    set_threads: Callable[[int], None],
    set_alone: Callable[[int], None],
) -> None:
    """Whether each is one thread's or all threads', by however many, in memory of anything."""
    spec = TableSpec(
        name="t", num_embeddings=rows_of, embedding_dim=dim, compression=train, feature_names=("f",)
    )
    torch.manual_seed(0)
    tables = build([replace(spec, init_std=1.0)], torch.device("cpu"))
    (table,) = tables.values()
    table.reset_parameters()
    lengths = torch.randint(int(longest == 1), longest + 1, (60_000,))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    ids = torch.randint(rows_of, (int(offsets[-1]),))
    assert ids.unique().numel() > 4 * 2**13, "several parts, four of them for some threads"
    weights = torch.rand(len(ids), requires_grad=True) if weighted else None
    wanted = [*table.parameters(), *([] if weights is None else [weights])]
    outcomes, held = [], []
    try:
        for count, alone, poison in ((1, 1, 0), (2, 0, 0), (2, 1, 1), (3, 1, 0), (4, 1, 1), (70, 1, 0)):
            set_threads(count)
            set_alone(alone)
            driver().recemb_tree_poison(poison)
            table.memo.clear()
            pooled = pooled_native([table], Bags(ids, offsets, 1, weights), micro_batch_rows)
            assert pooled is not None
            outcomes.append([pooled.detach(), *torch.autograd.grad(pooled.square().sum(), wanted)])
            held.append(group_of(tables).workspace_bytes)
    finally:
        driver().recemb_tree_poison(0)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))
    # Beside a list of all rows a workspace more may not show.
    assert longest > 1 or held[4] > held[2] > held[1] == held[5], "no thread had a workspace of its own"


@pytest.mark.parametrize("longest", [1, 2])
def test_mirrored_trains_in_parts(
    longest: int, set_threads: Callable[[int], None], set_alone: Callable[[int], None]
) -> None:
    shape = TrainShape((60, 50, 70), (2, 4, 2), (1, 8, 5, 1))
    kernel = tt_gather.kernel(shape)
    torch.manual_seed(0)
    cores = [torch.randn(p, r * q * s) for p, q, r, s in ((60, 2, 1, 8), (50, 4, 8, 5), (70, 2, 5, 1))]
    lengths = torch.randint(int(longest == 1), longest + 1, (60_000,))
    ids = torch.randint(60 * 50 * 70, (int(lengths.sum()),))
    batch = Batch(ids, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), None, 60_000)
    grad, outcomes = torch.randn(60_000, 16), []
    for count, cost, alone in ((2, 1e9, 1), (2, 1e-9, 0), (2, 1e-9, 1), (1, 1e-9, 1)):
        set_threads(count)
        set_alone(alone)
        kernels = [replace(kernel, mirrored_cost=(cost,) * 3)]
        outcomes.append(run_trains(kernels, cores, batch, grad, micro_batch_rows=2**13))
    straight, together, *others = outcomes
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(together, other, strict=True))
    assert not torch.equal(straight[0], together[0]), "both were read from the same end"
    for first, second in zip(straight, together, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-3 * float(first.abs().max()))


@pytest.mark.parametrize("row_shape", [(400, 50, 50), (3, 200, 50)])
@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adam])
def test_fused_steps_of_parts(
    kind: type[torch.optim.Optimizer],
    row_shape: tuple[int, ...],
    set_threads: Callable[[int], None],
    set_alone: Callable[[int], None],
) -> None:
    """Alone, together, and as the clock has it; also of three first digits, which are not cut in two."""
    rows = math.prod(row_shape)
    train = TensorTrain(rank=8, row_shape=row_shape)
    spec = TableSpec(name="t", num_embeddings=rows, embedding_dim=8, compression=train, feature_names=("f",))
    outcomes = []
    set_threads(2)
    for alone in (0, 1, -1):
        set_alone(alone)
        torch.manual_seed(0)
        tables = build([spec], torch.device("cpu"))
        tables["t"].reset_parameters()
        step_all(tables, kind, 0.01)
        for _ in range(35):
            ids = torch.randint(rows, (30_000,))
            pooled = pooled_native([tables["t"]], Bags(ids, torch.arange(30_001), 1), 2**14)
            assert pooled is not None
            (pooled - 1).square().mean().backward()
        outcomes.append([parameter.detach() for parameter in tables["t"].parameters()])
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_keys_that_no_double_holds() -> None:
    spec = TableSpec(
        name="t",
        num_embeddings=2**56,
        embedding_dim=4,
        compression=TensorTrain(rank=2, num_cores=8, row_shape=(2**7,) * 8, dim_shape=(1,) * 7 + (4,)),
        feature_names=("f",),
        init_std=1.0,
    )
    torch.manual_seed(0)
    (table,) = build([spec], torch.device("cpu")).values()
    table.reset_parameters()
    ids = torch.randint(0, 2**56, (500,))
    edges = torch.tensor([0, 2**53 - 1, 2**53, 2**53 + 1, 2**56 - 1])
    ids = torch.cat([ids, ids | 1, ids | 127, edges])
    pooled = pooled_native([table], Bags(ids, torch.arange(len(ids) + 1), 1))
    assert pooled is not None
    torch.testing.assert_close(pooled, table.rows(table.map_ids(ids)), rtol=1e-5, atol=1e-6)


def _trained(
    threads: Sequence[int], ahead: bool = False, batch: int = 300, rows: int | None = None
) -> tuple[list[Tensor], int]:
    """What tables of all methods put out, and are after steps by these threads in turn; their workspace."""
    before = torch.get_num_threads()
    engine, tables = make_engine()
    engine.micro_batch_rows = rows
    step_all(tables, torch.optim.Adagrad, 0.1)
    outs = []
    try:
        for k, (forward, backward) in enumerate(pairwise(threads)):
            torch.set_num_threads(forward)
            bags = make_bags(engine, batch, 1 + k % 3, seed=k)
            if ahead:
                engine.prefetch(tables, bags)
            out = engine(tables, bags)
            torch.set_num_threads(backward)
            out.square().mean().backward()
            outs.append(out.detach())
    finally:
        torch.set_num_threads(before)
    parameters = [parameter.detach() for table in tables.values() for parameter in table.parameters()]
    return [*outs, *parameters], group_of(tables).workspace_bytes


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("threads", [(2,) * 7, (3,) * 7, (2, 3, 1, 2, 2, 3, 1)])
def test_tables_that_one_thread_each_takes_come_out_with_the_same_bits(
    threads: tuple[int, ...], ahead: bool
) -> None:
    """Also where the backward has other threads than the forward, and of batches that were prepared."""
    alone, bytes_alone = _trained((1,) * 7)
    shared, bytes_shared = _trained(threads, ahead)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    # The first batch is shared out by its ids, later ones by the clock: each thread has a workspace then.
    assert len(set(threads)) > 1 or bytes_shared > bytes_alone, "no table was taken whole"


@pytest.mark.parametrize(("batch", "rows"), [(300, 100), (10_000, None), (10_000, 1000)])
def test_tables_that_one_thread_each_takes_may_be_large_and_come_in_slices(
    batch: int, rows: int | None
) -> None:
    alone, bytes_alone = _trained((1,) * 5, batch=batch, rows=rows)
    shared, bytes_shared = _trained((2,) * 5, batch=batch, rows=rows)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert bytes_shared > bytes_alone, "no table was taken whole"


def test_a_region_of_fewer_threads_than_asked_for_leaves_no_table_out() -> None:
    script = """
import torch
from tests.kernels.cases import make_kernels, run_trains, train_batch
kernels = [kernel for _, kernel in make_kernels(False)]
cores, batch, grad = train_batch(300, 1, False, 0)
outcomes = []
for asked in (1, 2):
    torch.get_num_threads = lambda: asked
    outcomes.append(run_trains(kernels, cores, batch, grad))
assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
print("equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_THREAD_LIMIT": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.parametrize("policy", ["", "active", "passive", "PASSIVE"])
def test_few_ids_are_shared_out_where_their_products_are_worth_it_and_no_thread_sleeps(policy: str) -> None:
    script = """
import ctypes, torch
from recemb_kernels.digit_tree.group import Batch, FeatureCode, Group, driver
from recemb_kernels.pooled_gather import Operation, RowShape, pooled_gather
from recemb_kernels.tt_gather import TrainShape, tt_gather
trains = [(tt_gather, TrainShape((8, 8, 8), (1, 1, 16), (1, rank, rank, 1))) for rank in (32, 64)]
for op, shape in (*trains, (pooled_gather, RowShape(Operation.ROW, (512,), (16,)))):
    group = Group([op.kernel(shape)], [FeatureCode(0, False)])
    parameters = [torch.ones(1)] * group.parameters[0]
    for ids, threads in ((64, 2), (128, 2), (128, 4), (511, 4), (512, 4)):
        batch = Batch(torch.zeros(ids).long(), torch.arange(ids + 1), None, ids)
        call = group._call(parameters, batch)
        print(driver().recemb_tree_threads(ctypes.addressof(call), threads), end=" ")
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, **({"OMP_WAIT_POLICY": policy} if policy else {})},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    # 1,024 and 4,096 multiply-adds an id, 65,536 a thread; a stored row has none.
    awake = {32: [1, 2, 1, 4, 4], 64: [2, 2, 4, 4, 4], 0: [1, 1, 1, 1, 4]}
    found = (
        [1, 1, 1, 1, 4] * 3 if policy.lower() == "passive" else [n for each in awake.values() for n in each]
    )
    assert done.stdout.split() == [str(n) for n in found], done.stderr[-2000:]
