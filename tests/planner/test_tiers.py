"""Bytes of placed rows against collections that are built."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recemb import ROBE, Dense, HotRows, MixedDimension, QuotientRemainder, TensorTrain
from recemb.backends.memory import cache_bytes
from recemb.planner.tiers import Rows, TieredTable, Tiers, stored_bytes
from recemb.spec import TableSpec
from recemb.torchrec_io.configs import to_configs
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection

OPTIMIZERS = (torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad, torch.optim.Adam)
METHODS: dict[str, Any] = {
    "tt": TensorTrain(rank=4),
    "qr": QuotientRemainder(collisions=4),
    "md": MixedDimension(dim=3),
    "robe": ROBE(compress_rate=4, block_size=8),
}


def table(compression: Any, rows: int = 101, name: str = "t") -> TableSpec:
    return TableSpec(
        name=name, num_embeddings=rows, embedding_dim=8, feature_names=(f"f_{name}",), compression=compression
    )


def built_bytes(tables: list[TableSpec], optimizer: type[torch.optim.Optimizer]) -> int:
    """Parameters, buffers and optimizer state of a collection, but for the counters of steps."""
    collection = EmbeddingBagCollection(tables=to_configs(tables))
    apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": 0.1})
    held: list[torch.Tensor] = [*collection.parameters(), *collection.buffers()]
    for state in collection.fused_optimizer.state_dict()["state"].values():
        held += [value for name, value in state.items() if name != "step"]
    assert all(isinstance(parameter, nn.Parameter) for parameter in collection.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def placed(spec: TableSpec, optimizer: type[torch.optim.Optimizer], hot: int) -> Tiers:
    ((row_bytes, compressed, cached),) = stored_bytes([spec], optimizer.__name__)
    rows = (Rows(spec.num_embeddings, 1.0),)
    return Tiers(TieredTable(spec.name, rows, row_bytes, compressed, 1, 2, 3, cached), hot, 0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_hot_rows_beside_compressed_ones_take_what_a_cache_takes(
    method: str, optimizer: type[torch.optim.Optimizer]
) -> None:
    spec = table(METHODS[method])
    assert placed(spec, optimizer, 0).hbm == built_bytes([spec], optimizer)
    for hot in (1, 15, 16, 17, 49, 50, 51, 52, 100) if method != "robe" else ():
        cached = replace(spec, compression=replace(spec.compression, cache=HotRows(rows=hot)))
        assert placed(spec, optimizer, hot).hbm == built_bytes([cached], optimizer), hot


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hot_rows_alone_are_an_uncompressed_table(optimizer: type[torch.optim.Optimizer]) -> None:
    spec = table(METHODS["qr"])
    assert placed(spec, optimizer, 101).hbm == built_bytes([replace(spec, compression=Dense())], optimizer)
    dense = placed(table(Dense()), optimizer, 0)
    assert dense.hbm == built_bytes([table(Dense())], optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tables_of_one_array_share_its_bytes(optimizer: type[torch.optim.Optimizer]) -> None:
    tables = [table(METHODS["robe"], rows, f"t{rows}") for rows in (50, 101, 70)]
    shared = sum(compressed for _, compressed, _ in stored_bytes(tables, optimizer.__name__))
    assert 0 <= shared - built_bytes(tables, optimizer) < len(tables)


@pytest.mark.parametrize("rows", [1, 2, 15, 31, 32, 33, 64, 65, 200])
def test_every_number_of_cached_rows(rows: int) -> None:
    """Between the corners, too."""
    spec = table(TensorTrain(rank=4), rows)
    ((_, _, corners),) = stored_bytes([spec], "RowWiseAdagrad")
    made = TieredTable("t", (Rows(rows, 1.0),), 36, 10, 1, 2, 3, corners)
    for hot in range(1, rows + 1):
        cached = replace(spec, compression=replace(spec.compression, cache=HotRows(rows=hot)))
        assert made.hot_bytes(hot, True) == cache_bytes(cached) + 4 * hot
    assert made.hot_bytes(0, True) == 0
