"""How a row store too big for one rank is cut: each rank has a table of its own over a part of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from recemb.errors import ConfigError
from recemb.id_maps.radix import ceil_div
from recemb.spec import TableSpec


@dataclass(frozen=True)
class RowSplit:
    """One table over W ranks, each of which looks up the ids that it has rows for.

    Ids travel as numbers that tell the rank too: rank k of the W serves ``ids_per_rank`` of them from
    ``k * ids_per_rank`` on, and its local id is what lies above that. Which rows a rank has, and so the sum
    of a bag's rows over the ranks, is that of the whole table.

    Attributes:
        param: the parameter that is cut; every rank holds the others whole.
        rows: how many of its rows each rank holds, in their order.
        tables: each rank's table, of local ids.
        ids_per_rank: how many numbers each rank serves.
    """

    param: str
    rows: Sequence[int]
    tables: Sequence[TableSpec]
    ids_per_rank: int

    def number(self, ids: Tensor) -> Tensor:
        """Ids of the whole table [L] -> the numbers that travel [L]: ids themselves, unless overridden."""
        return ids


def split_by_id(table: TableSpec, param: str, ranks: int) -> RowSplit:
    """A table with one row of ``param`` an id: rank k has the ids of its range.

    Raises:
        ConfigError: a rank would have none.
    """
    sizes = even_rows(table, param, table.num_embeddings, ranks)
    tables = [replace(table, num_embeddings=size, pooling="sum", part_of=table) for size in sizes]
    return RowSplit(param, sizes, tables, sizes[0])


def even_rows(table: TableSpec, param: str, rows: int, ranks: int) -> list[int]:
    """``rows`` of ``param`` as torchrec cuts a table row-wise: equal blocks, the last one what is left.

    Raises:
        ConfigError: a rank would have none.
    """
    block = ceil_div(rows, ranks)
    sizes = [min(block, rows - k * block) for k in range(ranks)]
    if sizes[-1] < 1:
        raise ConfigError(
            f"table {table.name!r}: the {rows} rows of its {param} do not reach {ranks} ranks in blocks of "
            f"{block}; plan it table_wise(rank=...) or data_parallel()"
        )
    return sizes
