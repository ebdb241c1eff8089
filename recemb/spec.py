"""What the user asks for: tables and their compressions. No storage, no device, no torch.

Letters used throughout recemb: N = ``num_embeddings`` (rows), D = ``embedding_dim``, B = batch size,
F = number of features, L = number of ids in a batch, R = tensor-train rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

from recemb.errors import ConfigError

Pooling = Literal["sum", "mean"]
DTypeName = Literal["float32", "float16", "bfloat16"]
CachePolicy = Literal["lfu", "lru", "importance"]
DTYPE_BYTES: dict[DTypeName, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
# Ranks that every table may have: one rank is often given to all tables, those of a few rows among them.
RANK_FOR_ANY_TABLE = 256
# Where the metadata of a collection in a state dict has its tables' settings.
SETTINGS_KEY = "recemb"


@dataclass(frozen=True, kw_only=True)
class HotRows:
    """A cache of a compressed table's hottest rows, which live uncompressed and train as plain rows.

    Rows enter and leave by themselves, between two training steps, one for another less than half as hot
    (under ``lru``, looked up before it): a new one starts at its compressed value, and one that leaves is
    written back into the compressed parameters, so that its training is kept. Ids come from the training
    batches alone; evaluation changes nothing. Rows are exchanged while the cached ones, and the parameters
    that they would be written back to, take a gradient: a frozen table stays as it is.

    Args:
        fraction: how many rows are cached, as a part of the table's N rows (at least one row), or
        rows: how many; a table with fewer has all of its own cached. Give one of the two.
        policy: whose rows are hot: ``lfu`` the most looked up, by counts that decay; ``lru`` the most
            recently looked up; ``importance`` those with the largest sum of gradient norms, which decays too
            (AdaEmbed, OSDI 2023; CAFE, SIGMOD 2024).
        refresh_every: training steps from one exchange of rows to the next.
        warmup: training steps before the first exchange; until then nothing is cached. ``None`` for
            min(64, refresh_every). 0 fills a cache of all rows at once; any other is filled when ids have
            been counted.
        decay: what a count keeps at each exchange, in (0, 1].
        write_back: whether a row that leaves is written into the compressed parameters. Without it the row
            falls back to its compressed value, and what it has learned as a plain row is lost.
        track_every: of how many training steps one has its ids counted; others pay for the look-up alone.
    """

    fraction: float | None = None
    rows: int | None = None
    policy: CachePolicy = "lfu"
    refresh_every: int = 64
    warmup: int | None = None
    decay: float = 0.9
    write_back: bool = True
    track_every: int = 4

    def __post_init__(self) -> None:
        _plain(self, "fraction", "rows", "refresh_every", "warmup", "decay", "track_every")
        if (self.fraction is None) == (self.rows is None):
            both = f"both fraction={self.fraction!r} and rows={self.rows!r} are given"
            neither = "neither fraction nor rows is given"
            raise ConfigError(
                f"HotRows: {neither if self.rows is None else both}; give one, e.g. HotRows(fraction=0.01)"
            )
        if self.fraction is not None and not (_is_number(self.fraction) and 0 < self.fraction <= 1):
            raise ConfigError(
                f"HotRows: fraction={self.fraction!r} must be a number in (0, 1], e.g. 0.01 for 1 % of rows"
            )
        if self.rows is not None and not (is_int(self.rows) and self.rows >= 1):
            raise ConfigError(f"HotRows: rows={self.rows!r} must be an int >= 1, e.g. rows=1000")
        policies = get_args(CachePolicy)
        if self.policy not in policies:
            raise ConfigError(f"HotRows: policy={self.policy!r} must be one of {', '.join(policies)}")
        for name, least in (("refresh_every", 1), ("track_every", 1), ("warmup", 0)):
            value = getattr(self, name)
            if not (is_int(value) and value >= least) and not (name == "warmup" and value is None):
                raise ConfigError(f"HotRows: {name}={value!r} must be an int >= {least}, e.g. {name}=64")
        if not (_is_number(self.decay) and 0 < self.decay <= 1):
            raise ConfigError(f"HotRows: decay={self.decay!r} must be a number in (0, 1], e.g. 0.9")
        if not isinstance(self.write_back, bool):
            raise ConfigError(f"HotRows: write_back={self.write_back!r} must be True or False")

    @property
    def first_refresh(self) -> int:
        """Training steps before the first exchange of rows."""
        return min(64, self.refresh_every) if self.warmup is None else self.warmup

    def capacity(self, num_embeddings: int) -> int:
        """How many rows of a table of N = ``num_embeddings`` are cached: 1 .. N."""
        if self.rows is not None:
            return min(self.rows, num_embeddings)
        assert self.fraction is not None
        return min(num_embeddings, max(1, round(self.fraction * num_embeddings)))


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How one table is stored. Each method is a frozen subclass that validates itself.

    ``method`` is the short name used by ``--method``, ``memory()`` and result files.

    Args:
        cache: keep the hottest rows uncompressed, or ``None``.
    """

    cache: HotRows | None = None
    method: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.cache is not None and not isinstance(self.cache, HotRows):
            raise ConfigError(
                f"{type(self).__name__}: cache={self.cache!r} must be HotRows(...) or None, e.g. "
                "cache=HotRows(fraction=0.01)"
            )

    def check(self, table: TableSpec) -> None:
        """Raise :class:`ConfigError` when this compression cannot hold ``table``."""


@dataclass(frozen=True, kw_only=True)
class Dense(Compression):
    """The uncompressed table: N x D weights, exactly torchrec's own."""

    method: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache is not None:
            raise ConfigError(
                f"Dense: cache={self.cache} would hold rows that are uncompressed already; remove it, or "
                "choose a compression, e.g. TensorTrain(rank=16, cache=HotRows(fraction=0.01))"
            )


@dataclass(frozen=True, kw_only=True)
class TensorTrain(Compression):
    """Tensor-train (TT-Rec, Yin et al., MLSys 2021, arXiv 2101.11714).

    The N x D table is a product of ``num_cores`` small cores G_k of shape [p_k, R_{k-1}, q_k, R_k] with
    prod(p) >= N, prod(q) = D and R_0 = R_d = 1; row i = G_1[i_1] G_2[i_2] ... with (i_1, i_2, ...) the
    mixed-radix digits of i in base p.

    Args:
        rank: bond rank R, one int for every bond or one per bond (``num_cores - 1`` of them). At most
            sqrt(N D) + D or 256, whichever is more.
        num_cores: number of cores d >= 2. TT-Rec uses 3.
        row_shape: p, or ``None`` for the shape with the fewest parameters.
        dim_shape: q, or ``None`` to choose. Three and more cores have their columns in the first and the last
            where the ranks lose no direction by it: of D = 16 (1, 1, 16) from rank 16 on, (2, 1, 8) from 8,
            (4, 1, 4) from 4. Lower ranks, two cores and a given ``row_shape`` take the most even split, as
            TT-Rec does: (2, 2, 4).
    """

    rank: int | tuple[int, ...]
    num_cores: int = 3
    row_shape: tuple[int, ...] | None = None
    dim_shape: tuple[int, ...] | None = None
    method: ClassVar[str] = "tt"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "row_shape", "dim_shape"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        _plain(self, "rank", "num_cores", "row_shape", "dim_shape")
        if not is_int(self.num_cores) or self.num_cores < 2:
            raise ConfigError(f"TensorTrain: num_cores={self.num_cores!r} must be an int >= 2, e.g. 3")
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,) * (self.num_cores - 1)
        if len(ranks) != self.num_cores - 1:
            raise ConfigError(
                f"TensorTrain: rank={self.rank!r} has {len(ranks)} bonds but {self.num_cores} cores have "
                f"{self.num_cores - 1}; give one int or {self.num_cores - 1} of them"
            )
        if not all(is_int(r) and r >= 1 for r in ranks):
            raise ConfigError(f"TensorTrain: rank={self.rank!r} must be ints >= 1, e.g. rank=16")
        for name in ("row_shape", "dim_shape"):
            shape = getattr(self, name)
            if shape is None:
                continue
            if not isinstance(shape, tuple):
                raise ConfigError(
                    f"TensorTrain: {name}={shape!r} must be {self.num_cores} ints, or None to choose"
                )
            if len(shape) != self.num_cores:
                raise ConfigError(
                    f"TensorTrain: {name}={shape} has {len(shape)} factors but num_cores={self.num_cores}; "
                    f"set num_cores={len(shape)} or give {self.num_cores} factors"
                )
            if not all(is_int(s) and s >= 1 for s in shape):
                raise ConfigError(f"TensorTrain: {name}={shape} must hold ints >= 1")

    @property
    def ranks(self) -> tuple[int, ...]:
        """R_0 .. R_d with the outer ones."""
        inner = self.rank if isinstance(self.rank, tuple) else (self.rank,) * (self.num_cores - 1)
        return (1, *inner, 1)

    def check(self, table: TableSpec) -> None:
        if self.row_shape is not None and math.prod(self.row_shape) < table.num_embeddings:
            last = -(-table.num_embeddings // math.prod(self.row_shape[:-1]))
            raise ConfigError(
                f"table {table.name!r}: TensorTrain row_shape={self.row_shape} holds "
                f"{math.prod(self.row_shape)} rows, fewer than num_embeddings={table.num_embeddings}; "
                f"e.g. row_shape={(*self.row_shape[:-1], last)}, or row_shape=None to choose one"
            )
        if self.dim_shape is not None and math.prod(self.dim_shape) != table.embedding_dim:
            raise ConfigError(
                f"table {table.name!r}: TensorTrain dim_shape={self.dim_shape} multiplies to "
                f"{math.prod(self.dim_shape)}, not to embedding_dim={table.embedding_dim}; "
                "use dim_shape=None to choose one"
            )
        self._check_rank(table)

    def _check_rank(self, table: TableSpec) -> None:
        # A bond's rank is that of a matrix of ceil(N/b) a rows and b c columns; b and c are the products of
        # the p and q to its right, and a c = D. Whatever b is, the shorter side is at most sqrt(N D) + D.
        useful = math.isqrt(table.num_embeddings * table.embedding_dim) + table.embedding_dim
        if max(self.ranks) > max(useful, RANK_FOR_ANY_TABLE):
            raise ConfigError(
                f"table {table.name!r}: TensorTrain rank={self.rank} exceeds {useful}, beyond which no rank "
                f"adds anything to num_embeddings={table.num_embeddings} rows of "
                f"embedding_dim={table.embedding_dim}; use rank <= {useful}, e.g. rank={min(16, useful)}"
            )
        # The mean of the cores' sizes is at least their geometric mean, whatever the shapes.
        logs = math.log(table.num_embeddings) + math.log(table.embedding_dim)
        logs = (logs + 2 * sum(map(math.log, self.ranks))) / self.num_cores
        each = [left * right for left, right in pairwise(self.ranks)]
        least = max(sum(each), self.num_cores * math.exp(min(logs, 61)))
        if least >= 2**61:
            raise ConfigError(
                f"table {table.name!r}: TensorTrain rank={self.rank} with num_cores={self.num_cores} takes "
                f"at least {least:.2g} weights, and must take fewer than 2**61: torch counts bytes in 63 "
                "bits; use a lower rank, e.g. rank=16"
            )


@dataclass(frozen=True, kw_only=True)
class QuotientRemainder(Compression):
    """Quotient-remainder trick (Shi et al., KDD 2020, arXiv 1909.02107).

    row i = E_q[i // c] o E_r[i mod c]; the two partitions are complementary, so every id keeps a row of
    its own. Combined before pooling, in int64.

    Args:
        collisions: c, how many ids share a quotient row; storage is ceil(N/c) + c rows.
        operation: ``mult``, ``add`` (both D wide) or ``concat`` (D/2 wide each).
    """

    collisions: int
    operation: Literal["mult", "add", "concat"] = "mult"
    method: ClassVar[str] = "qr"

    def __post_init__(self) -> None:
        super().__post_init__()
        _plain(self, "collisions")
        if not is_int(self.collisions) or self.collisions < 1:
            raise ConfigError(
                f"QuotientRemainder: collisions={self.collisions!r} must be an int >= 1, e.g. 4"
            )
        if self.operation not in ("mult", "add", "concat"):
            raise ConfigError(
                f"QuotientRemainder: operation={self.operation!r} must be 'mult', 'add' or 'concat'"
            )

    def check(self, table: TableSpec) -> None:
        if self.collisions > table.num_embeddings:
            raise ConfigError(
                f"table {table.name!r}: QuotientRemainder collisions={self.collisions} exceeds "
                f"num_embeddings={table.num_embeddings}; the fewest rows come at "
                f"collisions={max(1, math.isqrt(table.num_embeddings))}"
            )
        if self.operation == "concat" and table.embedding_dim < 2:
            raise ConfigError(
                f"table {table.name!r}: operation='concat' splits embedding_dim, which is "
                f"{table.embedding_dim}; use operation='mult'"
            )


@dataclass(frozen=True, kw_only=True)
class ROBE(Compression):
    """Random offset block embedding (Desai et al., MLSys 2022, arXiv 2108.02191).

    One array M of weights is shared by every table of ``group``. Element j of row x of table e is
    M[(h(e, x, j // Z) mod |M| + j mod Z) mod |M|] with a universal hash h.

    Args:
        compress_rate: (sum of N*D over the group's tables) / |M|; equal for all tables of the group.
        block_size: Z, how many consecutive elements one hash places.
        group: name of the shared array.
        use_sign: multiply each block by a hashed +1 or -1, which makes collisions cancel on average.
        seed: selects the hash functions; equal for all tables of the group.
    """

    compress_rate: float
    block_size: int
    group: str = "robe"
    use_sign: bool = False
    seed: int = 0
    method: ClassVar[str] = "robe"

    def __post_init__(self) -> None:
        super().__post_init__()
        _plain(self, "compress_rate", "block_size", "seed")
        rate = self.compress_rate
        if not (_is_number(rate) and 1 <= rate < math.inf):
            raise ConfigError(f"ROBE: compress_rate={rate!r} must be a number >= 1, e.g. 100")
        if not is_int(self.block_size) or self.block_size < 1:
            raise ConfigError(f"ROBE: block_size={self.block_size!r} must be an int >= 1, e.g. 16")
        if not isinstance(self.group, str):
            raise ConfigError(f"ROBE: group={self.group!r} must be a str, e.g. group='robe'")
        if not self.group:
            raise ConfigError("ROBE: group is empty; give the shared array a name, e.g. group='robe'")
        if not isinstance(self.use_sign, bool):
            raise ConfigError(f"ROBE: use_sign={self.use_sign!r} must be True or False")
        if not is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"ROBE: seed={self.seed!r} must be an int in [0, 2**63)")


@dataclass(frozen=True, kw_only=True)
class MixedDimension(Compression):
    """Mixed dimension embeddings (Ginart et al., arXiv 1909.11810).

    row i = E[i] P with E of shape [N, d] and a learned projection P of shape [d, D].

    Args:
        dim: d, between 1 and the table's ``embedding_dim``.
    """

    dim: int
    method: ClassVar[str] = "md"

    def __post_init__(self) -> None:
        super().__post_init__()
        _plain(self, "dim")
        if not is_int(self.dim) or self.dim < 1:
            raise ConfigError(f"MixedDimension: dim={self.dim!r} must be an int >= 1, e.g. 4")

    def check(self, table: TableSpec) -> None:
        if self.dim > table.embedding_dim:
            raise ConfigError(
                f"table {table.name!r}: MixedDimension dim={self.dim} exceeds "
                f"embedding_dim={table.embedding_dim}; use dim <= {table.embedding_dim}"
            )


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One table as recemb sees it, free of torch.

    Args:
        name: table name, part of the state-dict key ``embedding_bags.<name>.<param>``.
        num_embeddings: N, number of logical rows.
        embedding_dim: D.
        feature_names: features looked up in this table; the table's own name when empty.
        pooling: ``sum`` or ``mean``; the mean of an empty bag is 0.
        compression: how the table is stored.
        init_std: standard deviation that a freshly initialised row's elements have, whatever the method;
            ``None`` for torchrec's U(-1/sqrt(N), 1/sqrt(N)), whose deviation is 1/sqrt(3N).
        dtype: storage type of every parameter of the table.
        part_of: the table of which this one holds a part of the rows, on one rank of several.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    feature_names: tuple[str, ...] = ()
    pooling: Pooling = "sum"
    compression: Compression = field(default_factory=Dense)
    init_std: float | None = None
    dtype: DTypeName = "float32"
    part_of: TableSpec | None = None

    def __post_init__(self) -> None:
        if not self.name or "." in self.name:
            raise ConfigError(f"table name {self.name!r} must be non-empty and without '.'")
        _plain(self, "num_embeddings", "embedding_dim")
        for key in ("num_embeddings", "embedding_dim"):
            value = getattr(self, key)
            if not is_int(value) or value < 1:
                raise ConfigError(f"table {self.name!r}: {key}={value!r} must be an int >= 1")
            if value >= 2**61:
                raise ConfigError(f"table {self.name!r}: {key}={value} must be below 2**61")
        if self.dense_numel >= 2**61:
            raise ConfigError(
                f"table {self.name!r}: num_embeddings={self.num_embeddings} times "
                f"embedding_dim={self.embedding_dim} must be below 2**61: torch counts bytes in 63 bits"
            )
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"table {self.name!r}: dtype={self.dtype!r} must be one of {[*DTYPE_BYTES]}")
        if self.pooling not in ("sum", "mean"):
            raise ConfigError(f"table {self.name!r}: pooling={self.pooling!r} must be 'sum' or 'mean'")
        if not isinstance(self.compression, Compression):
            raise ConfigError(
                f"table {self.name!r}: compression={self.compression!r} is not a recemb compression; "
                "use e.g. TensorTrain(rank=16) or Dense()"
            )
        if self.init_std is not None and not (0 <= self.init_std < math.inf):
            raise ConfigError(f"table {self.name!r}: init_std={self.init_std!r} must be finite and >= 0")
        if not self.feature_names:
            object.__setattr__(self, "feature_names", (self.name,))
        self.compression.check(self)

    @property
    def cache_rows(self) -> int:
        """C, how many rows are cached uncompressed; 0 without a cache."""
        cache = self.compression.cache
        return 0 if cache is None else cache.capacity(self.num_embeddings)

    @property
    def row_std(self) -> float:
        """Standard deviation of a fresh row's elements."""
        if self.part_of is not None:
            return self.part_of.row_std
        return self.init_std if self.init_std is not None else math.sqrt(1 / (3 * self.num_embeddings))

    @property
    def dense_numel(self) -> int:
        """N * D, the uncompressed number of weights."""
        return self.num_embeddings * self.embedding_dim


def is_int(value: object) -> bool:
    """Whether a value is an int, and none of the bools that Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(settings: object, *names: str) -> None:
    """Store numpy's numbers, which overflow where Python's do not, as Python's; frozen settings too."""
    for name in names:
        object.__setattr__(settings, name, as_python(getattr(settings, name)))


def as_python(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(as_python, value))
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
