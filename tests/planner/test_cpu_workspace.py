"""The workspace that the planner counts for compressed tables, held to what the CPU's kernels hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from recemb.backends import build
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.planner.cpu_workspace import cpu_workspace
from recemb.planner.work import Load
from recemb.spec import ROBE, Compression, MixedDimension, QuotientRemainder, TableSpec, TensorTrain
from tests.kernels.cases import group_of

ROWS, BATCH = 200_000, 1000


@pytest.mark.parametrize(("count", "micro_batch_rows"), [(1, 2**18), (3, 2**18), (6, 2**18), (1, 300)])
@pytest.mark.parametrize(("hots", "weighted"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(
    ("dim", "compression"),
    [
        (16, TensorTrain(rank=8)),
        (16, TensorTrain(rank=32)),
        (16, TensorTrain(rank=32, dim_shape=(2, 2, 4))),
        (64, TensorTrain(rank=16)),
        (16, TensorTrain(rank=16, num_cores=2)),
        (16, TensorTrain(rank=16, num_cores=4)),
        (64, TensorTrain(rank=16, num_cores=2, dim_shape=(8, 8))),
        (256, TensorTrain(rank=32, dim_shape=(4, 4, 16))),
        (12, TensorTrain(rank=3)),
        (16, QuotientRemainder(collisions=4)),
        (16, ROBE(compress_rate=100, block_size=16)),
        (16, ROBE(compress_rate=100, block_size=32)),
        (16, ROBE(compress_rate=100, block_size=4)),
        (64, ROBE(compress_rate=100, block_size=24)),
        (16, MixedDimension(dim=4)),
    ],
)
def test_a_cpu_holds_no_more_than_is_counted(
    dim: int, compression: Compression, hots: int, count: int, micro_batch_rows: int, weighted: bool
) -> None:
    specs = [
        TableSpec(
            name=name,
            num_embeddings=ROWS,
            embedding_dim=dim,
            feature_names=(name,),
            compression=compression,
        )
        for name in (f"t{k}" for k in range(count))
    ]
    tables = build(specs, torch.device("cpu"))
    for table in tables.values():
        table.reset_parameters()
    ids = torch.randint(ROWS, (count * BATCH * hots,), generator=torch.Generator().manual_seed(0))
    engine = Engine(specs, micro_batch_rows=micro_batch_rows)
    weights = torch.ones(len(ids)) if weighted else None
    engine(tables, Bags(ids, torch.arange(0, len(ids) + 1, hots), count, weights)).sum().backward()
    held = group_of(tables).workspace_bytes
    loads = [Load(spec, BATCH * hots, BATCH) for spec in specs]
    counted = cpu_workspace(loads, 0, micro_batch_rows, weighted=weighted)
    assert held <= counted
    # Were every prefix distinct, bags of several ids, and more threads.
    assert counted <= 3 * held * max(1, count // 2 / torch.get_num_threads())


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("micro_batch_rows", [2**15, 2**13])
@pytest.mark.parametrize(("hots", "weighted"), [(1, False), (2, True)])
@pytest.mark.parametrize("train", [TensorTrain(rank=16), TensorTrain(rank=6, dim_shape=(4, 2, 2))])
def test_threads_that_take_parts_alone_hold_no_more(
    train: TensorTrain,
    hots: int,
    weighted: bool,
    micro_batch_rows: int,
    threads: int,
    set_threads: Callable[[int], None],
    set_alone: Callable[[int], None],
) -> None:
    """Eight parts, in a workspace of each thread's own."""
    spec = TableSpec(
        name="t", num_embeddings=10**7, embedding_dim=16, feature_names=("f",), compression=train
    )
    tables = build([spec], torch.device("cpu"))
    tables["t"].reset_parameters()
    samples = 80_000 // hots
    ids = torch.randint(10**7, (samples * hots,), generator=torch.Generator().manual_seed(0))
    weights = torch.ones(len(ids)) if weighted else None
    engine = Engine([spec], micro_batch_rows=micro_batch_rows)
    set_alone(1)
    set_threads(threads)
    bags = Bags(ids, torch.arange(0, len(ids) + 1, hots), 1, weights)
    engine(tables, bags).sum().backward()
    held = group_of(tables).workspace_bytes
    counted = cpu_workspace([Load(spec, len(ids), samples)], 0, micro_batch_rows, weighted=weighted)
    assert held <= counted
    # As if there were a thread for every part.
    assert counted <= 3 * held * 8 / threads


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize(
    ("compression", "size", "micro_batch_rows"),
    [
        # Ten first digits, which are not cut into parts alike; a digit of more rows than a slice's.
        (TensorTrain(rank=8, row_shape=(10, 5000, 20), dim_shape=(2, 2, 4)), 60_000, 2**15),
        (TensorTrain(rank=8, row_shape=(16, 1000, 63), dim_shape=(2, 2, 4)), 300_000, 2**13),
    ],
)
def test_few_first_digits_hold_no_more(
    compression: TensorTrain,
    size: int,
    micro_batch_rows: int,
    threads: int,
    set_threads: Callable[[int], None],
) -> None:
    specs = [
        TableSpec(
            name=name,
            num_embeddings=10**6,
            embedding_dim=16,
            feature_names=(name,),
            compression=compression,
        )
        for name in ("a", "b", "c")
    ]
    tables = build(specs, torch.device("cpu"))
    for table in tables.values():
        table.reset_parameters()
    ids = torch.randint(10**6, (3 * size,), generator=torch.Generator().manual_seed(0))
    engine = Engine(specs, micro_batch_rows=micro_batch_rows)
    set_threads(threads)
    engine(tables, Bags(ids, torch.arange(3 * size + 1), 3)).sum().backward()
    held = group_of(tables).workspace_bytes
    counted = cpu_workspace([Load(spec, size, size) for spec in specs], 0, micro_batch_rows, weighted=False)
    assert held <= counted


@pytest.mark.parametrize(
    ("rows", "train", "size"),
    [
        # Read from its other end, where products are wide and rows send nothing.
        (10**9, TensorTrain(rank=32, row_shape=(100_000, 110, 110), dim_shape=(1, 1, 16)), 300_000),
        # Of so many ids as few rows as one slice holds, or as two.
        (200_000, TensorTrain(rank=16, num_cores=2), 8_350),
        (200_000, TensorTrain(rank=32), 8_350),
        (100_000, TensorTrain(rank=32), 15_400),
    ],
)
def test_products_that_are_kept_are_counted(
    rows: int, train: TensorTrain, size: int, set_threads: Callable[[int], None]
) -> None:
    spec = TableSpec(name="t", num_embeddings=rows, embedding_dim=16, feature_names=("f",), compression=train)
    tables = build([spec], torch.device("cpu"))
    tables["t"].reset_parameters()
    ids = torch.randint(rows, (size,), generator=torch.Generator().manual_seed(0))
    set_threads(2)
    Engine([spec], micro_batch_rows=2**13)(tables, Bags(ids, torch.arange(size + 1), 1)).sum().backward()
    assert group_of(tables).workspace_bytes <= cpu_workspace(
        [Load(spec, size, size)], 0, 2**13, weighted=False
    )
