"""``--compress_rate R`` alone: settings per table so that the tables together take dense / R bytes.

Each table gets kappa * numel**(1 - temperature) parameters, the popularity rule that Ginart et al. (arXiv
1909.11810) derive for mixed dimensions: large tables are compressed harder than small ones, whose rows are
looked up more often. kappa is found by bisection, then single tables step up until the budget is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from recemb.backends import backend_of
from recemb.backends.memory import MemoryReport, cache_bytes, memory_report
from recemb.errors import ConfigError
from recemb.spec import (
    DTYPE_BYTES,
    ROBE,
    Compression,
    Dense,
    HotRows,
    MixedDimension,
    QuotientRemainder,
    TableSpec,
    TensorTrain,
)

TOLERANCE = 0.05
# Exponent of the popularity rule; dlrm's default for mixed dimensions.
TEMPERATURE = 0.3
METHODS = ("dense", "tt", "qr", "robe", "md")
# Whole vectors from 8 on; a row costs about R**2 multiply-adds, so past the last one would rather not train.
_RANKS = (1, 2, 3, 4, 6, 8, 12, *range(16, 257, 8))


@dataclass(frozen=True)
class BudgetedTables:
    """Tables with their compressions, and how close they come to the budget.

    Attributes:
        tables: the tables in the order given.
        compress_rate: dense bytes / bytes, as asked.
        shortfall: why the rate is missed by more than 5 %, or ``None``.
    """

    tables: tuple[TableSpec, ...]
    compress_rate: float
    shortfall: str | None

    @property
    def memory(self) -> MemoryReport:
        """Exact bytes per table."""
        return memory_report(self.tables)


def compress(
    tables: Sequence[TableSpec],
    method: str,
    compress_rate: float,
    method_threshold: int = 200,
    cache: HotRows | None = None,
) -> BudgetedTables:
    """Choose settings of ``method`` so that all tables together take dense bytes / ``compress_rate``.

    The bytes of a cache, rows and counters, are part of them: what it takes the compressed rows go without.

    Args:
        tables: the model's tables; their own compressions are replaced.
        method: one of ``METHODS``.
        compress_rate: R >= 1.
        method_threshold: tables of at most this many rows stay uncompressed (and count in the total).
        cache: of every table that is compressed, or ``None``.

    Raises:
        ConfigError: unknown method, rate below 1, or a rate or a cache for ``dense``.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is unknown; use one of {', '.join(METHODS)}")
    if not compress_rate >= 1 or compress_rate == float("inf"):
        raise ConfigError(f"compress_rate={compress_rate!r} must be a number >= 1, e.g. 100")
    if method == "dense":
        if compress_rate != 1:
            raise ConfigError(
                f"method 'dense' cannot reach compress_rate={compress_rate:g}; use tt, qr, robe or md"
            )
        if cache is not None:
            raise ConfigError("method 'dense' has nothing to cache; use tt, qr, robe or md, or no cache")
        return BudgetedTables(tuple(replace(t, compression=Dense()) for t in tables), 1.0, None)
    plain = [replace(table, compression=Dense()) for table in tables]
    chosen = [table for table in plain if table.num_embeddings > method_threshold]
    fixed = sum(table.dense_numel for table in plain if table.num_embeddings <= method_threshold)
    budget = sum(table.dense_numel for table in plain) / compress_rate - fixed
    if method == "robe":
        settled = _share_array(chosen, budget, cache)
    else:
        settled = _allocate([_ladder(table, method, cache) for table in chosen], budget)
    by_name = {table.name: table for table in settled}
    result = tuple(by_name.get(table.name, table) for table in plain)
    return BudgetedTables(result, compress_rate, _shortfall(result, method, compress_rate, method_threshold))


class _Ladder:
    """One table's settings in rising order of parameters; the last step is the uncompressed table.

    Args:
        table: the table, uncompressed.
        setting: the compression of a step; steps 0 .. ``last`` must not fall in parameters.
        last: the highest step worth asking for.
    """

    def __init__(self, table: TableSpec, setting: Callable[[int], Compression], last: int) -> None:
        self.table = table
        self._setting = setting
        self._numel: dict[int, int] = {}
        # Steps that do not beat the uncompressed table are cut off; the table itself takes their place.
        self.top = 1 + _last_true(lambda step: self._stored(step) < table.dense_numel, last)

    def numel(self, step: int) -> int:
        """Parameters at a step, the cache's bytes counted as such."""
        return self.table.dense_numel if step == self.top else self._stored(step)

    def at(self, step: int) -> TableSpec:
        """The table with the compression of a step."""
        return self.table if step == self.top else replace(self.table, compression=self._setting(step))

    def largest(self, numel: float) -> int:
        """The highest step of at most ``numel`` parameters; 0 when there is none."""
        return max(0, _last_true(lambda step: self.numel(step) <= numel, self.top))

    def _stored(self, step: int) -> int:
        if step not in self._numel:
            spec = replace(self.table, compression=self._setting(step))
            parameters = sum(map(math.prod, backend_of(spec).param_shapes([spec]).values()))
            self._numel[step] = parameters + _cache_numel(spec)
        return self._numel[step]


def _last_true(holds: Callable[[int], bool], last: int) -> int:
    """The largest i in [0, last] with ``holds(i)``, which turns from true to false once; -1 for none."""
    if last >= 0 and holds(last):
        # A large table is larger than any of its trains.
        return last
    low, high = -1, last - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _cache_numel(table: TableSpec) -> int:
    """Bytes of the table's cache, in parameters of the table's type."""
    return -(-cache_bytes(table) // DTYPE_BYTES[table.dtype])


def _ladder(table: TableSpec, method: str, cache: HotRows | None) -> _Ladder:
    if method == "tt":
        return _Ladder(table, lambda step: TensorTrain(rank=_RANKS[step], cache=cache), len(_RANKS) - 1)
    if method == "md":
        return _Ladder(table, lambda step: MixedDimension(dim=step + 1, cache=cache), table.embedding_dim - 1)
    # c + ceil(N / c) rows rise on both sides of c = sqrt(N). On the upper side the remainder is the longer
    # table: with ids in order of frequency, as `recemb prepare` gives them, the c hottest ids then have a
    # remainder row each, which colder ids share under another quotient. On the lower side hot ids would
    # share.
    least = math.isqrt(table.num_embeddings - 1) + 1
    return _Ladder(
        table,
        lambda step: QuotientRemainder(collisions=least + step, cache=cache),
        table.num_embeddings - least,
    )


def _allocate(ladders: Sequence[_Ladder], budget: float) -> list[TableSpec]:
    """Bisect kappa, then let single tables, largest first, step up into what rounding left."""
    weights = [ladder.table.dense_numel ** (1 - TEMPERATURE) for ladder in ladders]

    def steps_at(kappa: float) -> list[int]:
        return [ladder.largest(kappa * w) for ladder, w in zip(ladders, weights, strict=True)]

    def total(steps: Sequence[int]) -> int:
        return sum(ladder.numel(step) for ladder, step in zip(ladders, steps, strict=True))

    low, high = -40.0, 80.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if total(steps_at(2.0**middle)) <= budget else (low, middle)
    steps = steps_at(2.0**low)
    order = sorted(range(len(ladders)), key=lambda i: -ladders[i].table.dense_numel)

    def step_up(room: float) -> None:
        slack, moved = room - total(steps), True
        while moved:
            moved = False
            for i in order:
                if steps[i] == ladders[i].top:
                    continue
                extra = ladders[i].numel(steps[i] + 1) - ladders[i].numel(steps[i])
                if extra <= slack:
                    steps[i], slack, moved = steps[i] + 1, slack - extra, True

    step_up(budget)
    if total(steps) < (1 - TOLERANCE) * budget:
        step_up((1 + TOLERANCE / 2) * budget)
    return [ladder.at(step) for ladder, step in zip(ladders, steps, strict=True)]


def _share_array(tables: Sequence[TableSpec], budget: float, cache: HotRows | None) -> list[TableSpec]:
    """One ROBE array of ``budget`` parameters for all tables, blocks as long as a row: one hash a look-up."""
    if not tables:
        return []
    total = sum(table.dense_numel for table in tables)
    if budget >= total:
        return list(tables)
    # Any settings do to size a cache.
    probe = MixedDimension(dim=1, cache=cache)
    budget -= sum(_cache_numel(replace(table, compression=probe)) for table in tables)
    block = min(table.embedding_dim for table in tables)
    widest = max(table.embedding_dim for table in tables)
    # Whole blocks, so that rounding cannot take the array above the budget.
    rate = total / max(block * int(budget // block), block * -(-widest // block))
    return [replace(t, compression=ROBE(compress_rate=rate, block_size=block, cache=cache)) for t in tables]


def _shortfall(tables: Sequence[TableSpec], method: str, compress_rate: float, threshold: int) -> str | None:
    report = memory_report(tables)
    reached = report.total.ratio
    if abs(compress_rate / reached - 1) <= TOLERANCE:
        return None
    small = [record for record in report if record.num_embeddings <= threshold]
    biggest = max(report, key=lambda record: record.num_bytes)
    text = (
        f"{method} reaches {reached:.4g}x instead of {compress_rate:g}x: {report.total.num_bytes:,} of "
        f"{report.total.dense_bytes:,} bytes"
    )
    if reached > compress_rate:
        return f"{text}; its settings are too coarse to use the whole budget"
    text += (
        f" are its least here; the largest part is table {biggest.table!r} with {biggest.num_bytes:,} bytes"
    )
    kept = sum(record.num_bytes for record in small)
    advice = []
    if small:
        text += f", and the {len(small)} tables of at most {threshold} rows keep {kept:,} bytes uncompressed"
        advice.append("lower method_threshold")
    # Another method is no help where the small tables alone are over the budget, and none shrinks further
    # than robe, whose array can be as short as one row.
    if method != "robe" and kept * compress_rate <= report.total.dense_bytes:
        advice.append(
            "take robe, which shrinks further" if method == "tt" else "take tt or robe, which shrink further"
        )
    return f"{text} ({', or '.join(advice or ['ask for a lower compress_rate'])}){_cache_hint(tables)}"


def _cache_hint(tables: Sequence[TableSpec]) -> str:
    cached = sum(map(cache_bytes, tables))
    return f"; caches are {cached:,} bytes of it: lower the cache's fraction" if cached else ""
