"""``memory()``: the bytes of the parameters, table by table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torchrec.modules.embedding_configs import DataType

import recemb


def config(name: str, rows: int, dim: int, features: Sequence[str], **more: Any) -> recemb.EmbeddingBagConfig:
    return recemb.EmbeddingBagConfig(
        name=name, num_embeddings=rows, embedding_dim=dim, feature_names=list(features), **more
    )


def test_memory_counts_the_parameters() -> None:
    robe = recemb.ROBE(compress_rate=3, block_size=4)
    ours = recemb.EmbeddingBagCollection(
        tables=[
            config("a", 100, 4, ["a"], compression=recemb.TensorTrain(rank=2), data_type=DataType.FP16),
            config("b", 50, 6, ["b"], compression=robe),
            config("c", 20, 8, ["c"], compression=robe),
            config("d", 10, 4, ["d"]),
        ]
    )
    report = ours.memory()
    assert [record.table for record in report] == ["a", "b", "c", "d"]
    assert report.total.num_bytes == sum(p.numel() * p.element_size() for p in ours.parameters())
    assert report[0].dense_bytes == 100 * 4 * 2
    assert report[3].num_bytes == report[3].dense_bytes == 160
    array = ours.state_dict()["embedding_bags.b.array"].numel() * 4
    assert report[1].num_bytes + report[2].num_bytes == array
    assert report[1].num_bytes == array * 300 // 460
    assert report.total.ratio == pytest.approx(report.total.dense_bytes / report.total.num_bytes)
    text = str(report)
    for record in report:
        assert record.table in text
        assert f"{record.num_bytes:,}" in text


def test_columns_of_large_tables_stay_apart() -> None:
    names = ["a", "b"]
    tables = [
        config(name, 2**40, 16, [name], compression=recemb.TensorTrain(rank=4, num_cores=5)) for name in names
    ]
    report = recemb.EmbeddingBagCollection(tables=tables, device="meta").memory()
    head, *rows = str(report).splitlines()
    assert [len(row) for row in rows] == 3 * [len(head)]
    for record, row in zip(report, rows, strict=False):
        assert row.split() == [
            record.table,
            f"{2**40:,}",
            "16",
            "tt",
            f"{record.num_bytes:,}",
            f"{2**40 * 64:,}",
            f"{record.ratio:.1f}x",
        ]
