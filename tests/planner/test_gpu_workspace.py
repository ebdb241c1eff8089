"""What a GPU's workspace is taken to be, against what a GPU took."""

from __future__ import annotations

import pytest

from recemb.planner.gpu_workspace import Load, gpu_workspace
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


# H100, 2026-11-26, by hand: 26 tables of 1 M rows, TT R = 32, D = 16, B = 65,536, one id a bag, row-wise
# Adagrad; the peak of forward and backward above the weights. Zipf ids and uniform ones took the same.
@pytest.mark.parametrize(
    ("micro_batch_rows", "measured_mb"),
    [(2**30, 1504), (2**19, 908), (2**18, 775), (2**17, 709), (2**16, 601)],
)
def test_it_is_little_more_than_was_measured(micro_batch_rows: int, measured_mb: int) -> None:
    estimate = gpu_workspace(loads(26, TensorTrain(rank=32)), 1, micro_batch_rows)
    assert 1 <= estimate / (measured_mb * 1e6) <= 1.6


def test_families_hold_their_plans_beside_each_other() -> None:
    alike = gpu_workspace(loads(4, TensorTrain(rank=8)), 1, 2**14)
    unlike = gpu_workspace(
        [*loads(2, TensorTrain(rank=8)), *loads(2, TensorTrain(rank=16))],
        1,
        2**14,
    )
    # Of L = 4 x 65,536 ids, each family's three levels: slices, parents, children and orders.
    assert unlike - alike > 4 * 65_536 * 10 * 8


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
