"""Slices of the tables: while the rows of one travel, the next is looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo

from recemb.errors import ConfigError
from recemb.spec import TableSpec
from recemb.torchrec_io.sharding.held import ROW_WISE, TABLE_WISE


def check_slices(count: int) -> None:
    """Raise :class:`ConfigError` for a number of slices that there cannot be."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(
            f"communication_slices={count!r} must be an int >= 1: 1 sends all rows at once, 2 or 4 overlap"
        )


def sliced(
    by_type: Mapping[str, Sequence[EmbeddingShardingInfo]],
    count: int,
    together: Sequence[Sequence[TableSpec]],
) -> dict[str, list[EmbeddingShardingInfo]]:
    """The tables of each sharding type, parted into up to ``count`` slices.

    torchrec looks sharding types up one after the other and sends the rows of each while it goes on with the
    next; in the backward, all gradients are under way before the first is awaited. Slices are further
    shardings of the same type, so that a table is still looked up and stepped once, over the whole batch, and
    results keep their bits; only sums over three ranks and more, of row-wise tables, are taken in another
    order. (EcoRec, SC 2024, slices samples; a table would then take several steps a batch, or wait
    for all of its gradients.)

    Every rank takes part in each slice's exchange: a rank's columns, D for each feature, are spread evenly.
    Replicated tables send no rows, and uncompressed ones cut in other ways stay as they are.

    Args:
        by_type: of each table, by torchrec's sharding type.
        count: slices a type.
        together: tables that share storage, which one look-up serves.

    Returns:
        The same, the k-th further slice of a type under ``<type>:<k>``.
    """
    found: dict[str, list[EmbeddingShardingInfo]] = {}
    for kind, infos in by_type.items():
        parts = _parts(infos, count, together) if kind in (TABLE_WISE, ROW_WISE) else [list(infos)]
        found.update(dict(zip(_names(kind, len(parts)), parts, strict=True)))
    return found


def sliced_order(kinds: Sequence[str], count: int) -> list[str]:
    """An order of sharding types as one of their slices, of up to ``count`` each."""
    return [name for kind in kinds for name in _names(kind, count)]


def _names(kind: str, count: int) -> list[str]:
    return [kind, *(f"{kind}:{k}" for k in range(1, count))]


def _parts(
    infos: Sequence[EmbeddingShardingInfo], count: int, together: Sequence[Sequence[TableSpec]]
) -> list[list[EmbeddingShardingInfo]]:
    """Largest first, each to the slice that has the fewest columns of its ranks; empty ones are left out."""
    home = {peer.name: peers[0].name for peers in together for peer in peers}
    units: dict[str, list[int]] = {}
    for at, info in enumerate(infos):
        name = info.embedding_config.name
        units.setdefault(home.get(name, name), []).append(at)
    loads: list[dict[int, int]] = [{} for _ in range(count)]
    parts: list[list[int]] = [[] for _ in range(count)]
    for unit in sorted(units.values(), key=lambda unit: -sum(_columns(infos[at]) for at in unit)):
        ranks = infos[unit[0]].param_sharding.ranks or ()
        k = min(range(count), key=lambda k: (max((loads[k].get(rank, 0) for rank in ranks), default=0), k))
        parts[k] += unit
        for rank in ranks:
            loads[k][rank] = loads[k].get(rank, 0) + sum(_columns(infos[at]) for at in unit)
    return [[infos[at] for at in sorted(part)] for part in parts if part]


def _columns(info: EmbeddingShardingInfo) -> int:
    config = info.embedding_config
    return int(config.embedding_dim) * len(config.feature_names)
