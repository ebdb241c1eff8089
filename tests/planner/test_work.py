"""The workspace that the planner counts for a compressed table, held to what the CPU's kernels hold."""

from __future__ import annotations

import pytest
import torch

from recemb.backends import build
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.planner.work import forward_work
from recemb.spec import ROBE, Compression, MixedDimension, QuotientRemainder, TableSpec, TensorTrain
from tests.kernels.cases import group_of

ROWS, BATCH = 200_000, 1000


@pytest.mark.parametrize("hots", [1, 2])
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
def test_a_cpu_holds_no_more_than_is_counted(dim: int, compression: Compression, hots: int) -> None:
    spec = TableSpec(
        name="t",
        num_embeddings=ROWS,
        embedding_dim=dim,
        feature_names=("t",),
        compression=compression,
    )
    tables = build([spec], torch.device("cpu"))
    tables["t"].reset_parameters()
    ids = torch.randint(ROWS, (BATCH * hots,), generator=torch.Generator().manual_seed(0))
    out = Engine([spec])(tables, Bags(ids, torch.arange(0, BATCH * hots + 1, hots), 1))
    out.sum().backward()
    # Memory that only grows takes a quarter more than is asked for.
    held = group_of(tables).workspace_bytes / 1.25
    counted = forward_work(spec, BATCH * hots, BATCH, micro_batch_rows=2**18).workspace
    assert held <= counted
    # Were every prefix distinct, weights asked for and bags of several ids: not many times too much either.
    assert counted <= 3 * held
