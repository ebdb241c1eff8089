"""What a GPU's workspace is taken to be; ``tests/kernels/triton`` holds it to the launches' arrays."""

from __future__ import annotations

import pytest

from recemb.planner.gpu_workspace import gpu_workspace
from recemb.planner.work import Load
from recemb.spec import Compression, HotRows, QuotientRemainder, TableSpec, TensorTrain


def loads(count: int, compression: Compression, dim: int = 16, batch: int = 65_536) -> list[Load]:
    return [
        Load(
            TableSpec(
                name=f"t_{k}",
                num_embeddings=1_000_000,
                embedding_dim=dim,
                feature_names=(f"f_{k}",),
                compression=compression,
            ),
            batch,
            batch,
        )
        for k in range(count)
    ]


def test_families_hold_their_plans_beside_each_other() -> None:
    alike = gpu_workspace(loads(4, TensorTrain(rank=8)), 1, 2**14)
    unlike = gpu_workspace(
        [*loads(2, TensorTrain(rank=8)), *loads(2, TensorTrain(rank=16))],
        1,
        2**14,
    )
    # Of L = 4 x 65,536 ids, each family's rows: slices, parents and orders.
    assert unlike - alike > 4 * 65_536 * 3 * 4


def test_ranks_share_the_ids_but_a_table_is_whole() -> None:
    tables = loads(8, QuotientRemainder(collisions=4))
    one, eight = (gpu_workspace(tables, world, 2**18) for world in (1, 8))
    # The mean of a table a rank, and seven eighths of the largest.
    assert eight / one == pytest.approx((1 + 7 / 8) / 8, rel=0.01)
    alone = gpu_workspace(tables[:1], 1, 2**18)
    assert gpu_workspace(tables[:1], 8, 2**18) == pytest.approx(alone, rel=1e-6)


def test_cached_rows_are_looked_up_besides() -> None:
    plain, cached = (
        gpu_workspace(loads(2, TensorTrain(rank=8, cache=cache)), 1, 2**18)
        for cache in (None, HotRows(rows=100))
    )
    assert 1.3 < cached / plain < 2.5


def test_nothing_compressed_needs_nothing() -> None:
    assert gpu_workspace([], 8, 2**18) == 0
