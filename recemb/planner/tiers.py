"""Tables whose rows are placed one by one: hot in HBM, warm in DDR, or left to compressed parameters.

What hot rows take depends on whether other rows of the table are compressed. If so they are cached rows
(:class:`recemb.HotRows`), with the ids, scores and candidates of the cache beside them; else they are plain
rows of an uncompressed table. Both come with their optimizer state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from recemb.backends import storages
from recemb.backends.memory import cache_bytes, memory_report
from recemb.cache.layout import CANDIDATES_PER_ROW, LEAST_CANDIDATES
from recemb.id_maps.radix import ceil_div
from recemb.planner.layout import Floats, Ints
from recemb.planner.work import optimizer_bytes, parameter_bytes
from recemb.spec import Dense, HotRows, TableSpec

# Of so many rows, and what they take: linear from one to the next.
Corners = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rows:
    """Rows of equal frequency.

    Attributes:
        count: how many.
        lookups: of each in a step.
    """

    count: int
    lookups: float


@dataclass(frozen=True)
class TieredTable:
    """A table to be placed by rows.

    Attributes:
        rows: most frequent first.
        row_bytes: of an uncompressed row.
        compressed_bytes: of its parameters when any row is left to them.
        hot_ns, warm_ns, cold_ns: of one look-up in HBM, in DDR (no less), and from the compressed parameters.
        cached_bytes: of hot rows when any row is left to the compressed parameters, from one row to all;
            empty for ``row_bytes`` each.
    """

    name: str
    rows: tuple[Rows, ...]
    row_bytes: int
    compressed_bytes: int
    hot_ns: float
    warm_ns: float
    cold_ns: float
    cached_bytes: Corners = ()

    @property
    def num_rows(self) -> int:
        return sum(rows.count for rows in self.rows)

    def hot_bytes(self, rows: int, cold: bool) -> int:
        """Bytes of so many hot rows, ``cold`` when others are left to the compressed parameters."""
        if not (rows and cold and self.cached_bytes):
            return rows * self.row_bytes
        (start, before), (end, after) = self.cached_bytes[0], self.cached_bytes[-1]
        for corner in self.cached_bytes:
            if corner[0] <= rows:
                start, before = corner
            else:
                end, after = corner
                break
        return before + (after - before) * (rows - start) // max(1, end - start)

    @cached_property
    def groups(self) -> tuple[Ints, Floats]:
        """Counts and look-ups of groups of rows of equal frequency, no corner of ``cached_bytes`` inside."""
        ends = np.cumsum([rows.count for rows in self.rows])
        every = np.unique([*ends, *(rows for rows, _ in self.cached_bytes if rows < ends[-1])])
        lookups = np.asarray([rows.lookups for rows in self.rows])
        return np.diff(every, prepend=0), lookups[np.searchsorted(ends, every)]

    @cached_property
    def hot_bytes_of_groups(self) -> Ints:
        """[groups + 1] :meth:`hot_bytes` of the first 0, 1, ... groups beside compressed rows."""
        ends = [0, *np.cumsum(self.groups[0]).tolist()]
        return np.asarray([self.hot_bytes(rows, True) for rows in ends], np.int64)

    def ns(self, hot: int, warm: int) -> float:
        """Expected time of a step's look-ups with the first rows hot and the next warm."""
        total, start = 0.0, 0
        for rows in self.rows:
            end = start + rows.count
            in_hot = max(0, min(hot, end) - start)
            in_warm = max(0, min(hot + warm, end) - start) - in_hot
            in_cold = rows.count - in_hot - in_warm
            total += rows.lookups * (in_hot * self.hot_ns + in_warm * self.warm_ns + in_cold * self.cold_ns)
            start = end
        return total


@dataclass(frozen=True)
class Tiers:
    """Where a table's rows lie: the first ``hot``, the next ``warm``, and the others compressed."""

    table: TieredTable
    hot: int
    warm: int

    @property
    def cold(self) -> int:
        return self.table.num_rows - self.hot - self.warm

    @property
    def hbm(self) -> int:
        """Bytes of hot rows, and of compressed parameters when rows are left to them."""
        cold = self.cold > 0
        return self.table.hot_bytes(self.hot, cold) + (self.table.compressed_bytes if cold else 0)

    @property
    def ddr(self) -> int:
        return self.warm * self.table.row_bytes

    @property
    def ns(self) -> float:
        return self.table.ns(self.hot, self.warm)


@dataclass(frozen=True)
class TierPlan:
    """A placement of all tables.

    Attributes:
        bound_ns: no placement within the budgets is faster.
    """

    tiers: tuple[Tiers, ...]
    bound_ns: float

    @property
    def ns(self) -> float:
        return sum(tiers.ns for tiers in self.tiers)

    @property
    def gap(self) -> float:
        """How far above the bound, as a fraction."""
        return max(0.0, self.ns / self.bound_ns - 1) if self.bound_ns > 0 else 0.0


def stored_bytes(tables: Sequence[TableSpec], optimizer: str) -> list[tuple[int, int, Corners]]:
    """Of each table its ``row_bytes``, ``compressed_bytes`` and ``cached_bytes``, optimizer state included.

    The counters of steps, 4 bytes a parameter, are left out.

    Args:
        tables: without caches. Tables that share an array each have a part of it and of its state.
        optimizer: the name of its class.
    """
    parts: dict[str, tuple[int, int]] = {}
    for _, peers in storages(tables):
        state, parameters = optimizer_bytes(peers, optimizer), parameter_bytes(peers)
        parts |= dict.fromkeys((peer.name for peer in peers), (state, parameters))
    found = []
    for table, record in zip(tables, memory_report(tables), strict=True):
        row = [replace(table, num_embeddings=1, compression=Dense())]
        row_state = optimizer_bytes(row, optimizer)
        state, parameters = parts[table.name]
        found.append(
            (
                parameter_bytes(row) + row_state,
                record.num_bytes + ceil_div(state * record.num_bytes, parameters),
                _cached_bytes(table, row_state),
            )
        )
    return found


def _cached_bytes(table: TableSpec, row_state: int) -> Corners:
    """The corners of a cache's bytes; none for a table that is not compressed, and has no cache."""
    if isinstance(table.compression, Dense):
        return ()
    rows = table.num_embeddings
    # Between these the number of candidates is linear in that of cached rows.
    least, most = LEAST_CANDIDATES // CANDIDATES_PER_ROW, rows // CANDIDATES_PER_ROW
    corners = sorted({count for count in (1, least, most, most + 1, rows) if 1 <= count <= rows})
    cached = [
        replace(table, compression=replace(table.compression, cache=HotRows(rows=count))) for count in corners
    ]
    return tuple(
        (count, cache_bytes(each) + count * row_state) for count, each in zip(corners, cached, strict=True)
    )
