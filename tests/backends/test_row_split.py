"""Law 8: the tables of the ranks, put together, are the whole table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recemb import ROBE, Compression, Dense, MixedDimension, QuotientRemainder, TensorTrain
from recemb.backends import backend_of, build
from recemb.errors import ConfigError
from recemb.spec import TableSpec

CPU = torch.device("cpu")


def _table(compression: Compression, rows: int, **others: Any) -> TableSpec:
    arguments = {"embedding_dim": 6, **others}
    return TableSpec(name="t", num_embeddings=rows, compression=compression, **arguments)


def _compression(kind: str, collisions: int, dim: int) -> Compression:
    if kind == "dense":
        return Dense()
    if kind == "md":
        return MixedDimension(dim=dim)
    operation: Any = kind
    return QuotientRemainder(collisions=collisions, operation=operation)


@given(
    kind=st.sampled_from(["dense", "md", "mult", "add", "concat"]),
    rows=st.integers(1, 400),
    share=st.floats(0, 1),
    dim=st.integers(1, 6),
    ranks=st.integers(1, 5),
)
def test_the_ranks_hold_the_whole_table_between_them(
    kind: str, rows: int, share: float, dim: int, ranks: int
) -> None:
    table = _table(_compression(kind, max(1, round(share * rows)), dim), rows, pooling="mean")
    whole = build([table], CPU)["t"]
    whole.reset_parameters()
    longest = max(len(parameter) for name, parameter in whole.named_parameters() if name != "p")
    if -(-longest // ranks) * (ranks - 1) >= longest:
        with pytest.raises(ConfigError, match=r"'t'.* do not reach"):
            backend_of(table).split_rows(table, ranks)
        return
    split = backend_of(table).split_rows(table, ranks)
    assert split is not None
    parts = [build([part], CPU)["t"] for part in split.tables]
    starts = [sum(split.rows[:k]) for k in range(ranks)]
    with torch.no_grad():
        for part, start, size in zip(parts, starts, split.rows, strict=True):
            for name, own in part.own_parameters().items():
                given_ = whole.own_parameters()[name]
                own.copy_(given_[start : start + size] if name == split.param else given_)
    ids = torch.arange(rows)
    numbers = split.number(ids)
    assert int(numbers.unique().numel()) == rows, "two ids travel as one number"
    rank, local = numbers // split.ids_per_rank, numbers % split.ids_per_rank
    assert int(rank.max()) < ranks
    for k, (part, spec) in enumerate(zip(parts, split.tables, strict=True)):
        mine = rank == k
        assert int(local[mine].max() if mine.any() else 0) < spec.num_embeddings
        assert spec.pooling == "sum"
        assert torch.equal(part.rows(part.map_ids(local[mine])), whole.rows(whole.map_ids(ids[mine])))
    assert sum(split.rows) == len(whole.own_parameters()[split.param])


@pytest.mark.parametrize(
    "compression",
    [
        Dense(),
        MixedDimension(dim=32),
        QuotientRemainder(collisions=900),
        QuotientRemainder(collisions=1100),
        QuotientRemainder(collisions=1100, operation="add"),
    ],
)
def test_fresh_parts_have_the_deviation_of_the_whole(compression: Compression) -> None:
    # The longer side of a pair is the shorter one on each rank.
    table = _table(compression, 1_000_000, embedding_dim=64)
    torch.manual_seed(0)
    split = backend_of(table).split_rows(table, 3)
    assert split is not None
    for spec in split.tables:
        part = build([spec], CPU)["t"]
        part.reset_parameters()
        if compression in (QuotientRemainder(collisions=900), QuotientRemainder(collisions=1100)):
            # The side that every rank has whole is drawn around 1 on all of them, the other around 0.
            means = {name: float(own.detach().mean()) for name, own in part.own_parameters().items()}
            assert abs(means.pop(split.param)) < 0.1
            assert means.popitem()[1] == pytest.approx(1, abs=0.1)
        drawn = part.rows(part.map_ids(torch.randint(0, spec.num_embeddings, (20_000,))))
        assert float(drawn.detach().std()) == pytest.approx(table.row_std, rel=0.1)


@pytest.mark.parametrize("compression", [TensorTrain(rank=4), ROBE(compress_rate=4, block_size=2)])
def test_methods_without_a_store_of_rows_are_not_cut(compression: Compression) -> None:
    table = _table(compression, 100)
    assert backend_of(table).split_rows(table, 2) is None


def test_ids_of_a_big_table_travel_in_int64() -> None:
    table = _table(QuotientRemainder(collisions=2**31), 2**40)
    split = backend_of(table).split_rows(table, 3)
    assert split is not None
    ids = torch.tensor([0, 2**31 - 1, 2**40 - 1])
    expected = []
    for i in ids.tolist():
        quotient, remainder = divmod(i, 2**31)
        rank = remainder // split.rows[0]
        expected.append(
            rank * split.ids_per_rank + quotient * split.rows[rank] + remainder - rank * split.rows[0]
        )
    assert split.number(ids).tolist() == expected
