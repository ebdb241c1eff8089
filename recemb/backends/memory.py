"""Bytes per table, exact and without building anything; the table a user checks a plan against."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recemb.backends import storages
from recemb.cache.layout import buffer_bytes
from recemb.spec import DTYPE_BYTES, TableSpec


@dataclass(frozen=True)
class TableMemory:
    """One table's storage. A shared array is split over its tables by their N * D.

    Attributes:
        num_bytes: bytes of the parameters as stored, with cached rows and the buffers of their cache.
        dense_bytes: bytes of the same table uncompressed, N * D elements of the same dtype.
    """

    table: str
    num_embeddings: int
    embedding_dim: int
    method: str
    num_bytes: int
    dense_bytes: int

    @property
    def ratio(self) -> float:
        """``dense_bytes / num_bytes``; above 1 is smaller than the uncompressed table."""
        return self.dense_bytes / max(1, self.num_bytes)


@dataclass(frozen=True)
class MemoryReport(Sequence[TableMemory]):
    """Per-table records in table order; prints as a table with a total."""

    records: tuple[TableMemory, ...]

    def __getitem__(self, index):  # type: ignore[no-untyped-def] # int and slice overloads of Sequence
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[TableMemory]:
        return iter(self.records)

    @property
    def total(self) -> TableMemory:
        """The sum over the tables; ``ratio`` is the whole collection's compression."""
        return TableMemory(
            table="total",
            num_embeddings=sum(r.num_embeddings for r in self.records),
            embedding_dim=max((r.embedding_dim for r in self.records), default=0),
            method="",
            num_bytes=sum(r.num_bytes for r in self.records),
            dense_bytes=sum(r.dense_bytes for r in self.records),
        )

    def __str__(self) -> str:
        head = ("table", "rows", "dim", "method", "bytes", "dense bytes", "ratio")
        rows = [head] + [
            (
                r.table[:23],
                f"{r.num_embeddings:,}",
                str(r.embedding_dim),
                r.method,
                f"{r.num_bytes:,}",
                f"{r.dense_bytes:,}",
                f"{r.ratio:.1f}x",
            )
            for r in (*self.records, self.total)
        ]
        least = (23, 14, 5, 8, 15, 17, 9)
        widths = [max(least[k], *(len(row[k]) for row in rows)) for k in range(len(head))]
        lines = [
            " ".join(
                # Names to the left, numbers to the right.
                cell.ljust(width) if k in (0, 3) else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join(lines)


def cache_bytes(table: TableSpec) -> int:
    """Bytes of the cached rows of a table and of what its cache keeps beside them."""
    return table.cache_rows * table.embedding_dim * DTYPE_BYTES[table.dtype] + buffer_bytes(table)


def memory_report(tables: Sequence[TableSpec]) -> MemoryReport:
    """Exact bytes of every table's parameters and caches; gradients and optimizer state are not counted."""
    num_bytes: dict[str, int] = {}
    for backend, peers in storages(tables):
        shapes = backend.param_shapes(peers).values()
        total = sum(map(math.prod, shapes)) * DTYPE_BYTES[peers[0].dtype]
        dense, assigned, seen = sum(t.dense_numel for t in peers), 0, 0
        for table in peers:
            seen += table.dense_numel
            share = total * seen // dense - assigned
            num_bytes[table.name], assigned = share + cache_bytes(table), assigned + share
    return MemoryReport(
        tuple(
            TableMemory(
                table=t.name,
                num_embeddings=t.num_embeddings,
                embedding_dim=t.embedding_dim,
                method=t.compression.method,
                num_bytes=num_bytes[t.name],
                dense_bytes=t.dense_numel * DTYPE_BYTES[t.dtype],
            )
            for t in tables
        )
    )
