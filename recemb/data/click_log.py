"""Read a prepared directory: batches of clicks for training and evaluation, each row exactly once an epoch.

**Order.** Without a seed, rows come in time order. With one, the row groups (65,536 rows) of all files are
put in a random order, every 16 of them form a window of about 1 M rows, and a window's rows are shuffled:
memory is bounded by two windows, and a row can meet any other row of the log in its batch. The order depends
on the seed and the files alone, not on the batch size, the number of ranks or whether the log is in memory.

**Ranks.** Batch ``i`` of the epoch goes to rank ``i mod world_size``: at step ``s`` the ranks together see
the rows that one process would see with a ``world_size`` times larger batch. The last batch may be smaller,
and the last ranks may have one batch less; :meth:`ClickLog.num_batches` tells how many before anything is
read.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from recemb.data.layout import (
    CATEGORICAL_NAMES,
    DENSE_NAMES,
    FORMAT_VERSION,
    LABEL_NAME,
    NUM_DENSE,
    SPLITS,
    STATS_FILE,
    WORK_DIR,
    read_json,
)
from recemb.data.parts import PartFile, PartInfo, Rows, click_log_schema
from recemb.errors import ConfigError, DataError

SHUFFLE_WINDOW_ROW_GROUPS: Final = 16
IN_MEMORY_BYTES: Final = 512 << 20
_OPEN_FILES: Final = 16


@dataclass(frozen=True)
class ClickBatch:
    """One batch of B rows.

    Attributes:
        dense: float32 [B, 13], transformed integer features, finite.
        ids: int64 [F, B], feature-major and C-contiguous: ``ids.ravel()`` is the value tensor of a
            KeyedJaggedTensor in which every bag holds one id.
        labels: float32 [B], 0 or 1.
    """

    dense: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _RowGroup:
    part: PartInfo
    index: int

    @property
    def rows(self) -> int:
        return self.part.row_group_rows[self.index]


class ClickLog:
    """A prepared directory, checked when opened.

    Example::

        log = ClickLog.open("runs/kaggle_data")
        for batch in log.batches("train", 2048, shuffle_seed=0):
            ...
    """

    def __init__(self, path: Path, stats: dict[str, Any], parts: dict[str, list[PartInfo]]) -> None:
        self.path: Final = path
        self.stats: Final = stats
        self.dense_names: Final = list(DENSE_NAMES)
        self.feature_names: Final = [str(feature["name"]) for feature in stats["features"]]
        self.num_embeddings_per_feature: Final = [
            int(feature["num_embeddings"]) for feature in stats["features"]
        ]
        self._schema = click_log_schema(self.num_embeddings_per_feature)
        self._groups = {
            split: [
                _RowGroup(part, index) for part in parts[split] for index in range(len(part.row_group_rows))
            ]
            for split in SPLITS
        }
        self._files: OrderedDict[str, PartFile] = OrderedDict()
        self._memory: dict[_RowGroup, Rows] = {}
        bytes_per_row = (
            1 + 4 * NUM_DENSE + sum(4 if n <= 2**31 else 8 for n in self.num_embeddings_per_feature)
        )
        self._keep = sum(self.num_rows(split) for split in SPLITS) * bytes_per_row <= IN_MEMORY_BYTES

    @classmethod
    def open(cls, path: str | Path) -> ClickLog:
        """Open the prepared directory ``path`` and check every file of it.

        Raises:
            DataError: naming the file, when the directory is no finished prepared directory or one of its
                files is missing, truncated or of another schema. (A row group's checksum is compared when it
                is read.)
        """
        root = Path(path)
        if not (root / STATS_FILE).is_file():
            if (root / WORK_DIR).is_dir():
                raise DataError(
                    f"{root}: unfinished; give the same `recemb prepare` command again to complete it"
                )
            raise DataError(
                f"{root}: no prepared click log ({STATS_FILE} is missing); make one with `recemb prepare`"
            )
        stats = read_json(root / STATS_FILE)
        parts = _check_stats(root / STATS_FILE, stats)
        log = cls(root, stats, parts)
        for split in SPLITS:
            for part in parts[split]:
                PartFile(root, part, log._schema).close()
        return log

    def num_rows(self, split: str) -> int:
        """Rows of ``split`` ("train", "val" or "test"; 0 when the log has no such split)."""
        return sum(group.rows for group in self._split_groups(split))

    def num_batches(self, split: str, batch_size: int, rank: int = 0, world_size: int = 1) -> int:
        """Batches that ``rank`` of ``world_size`` ranks gets from one epoch, a smaller last one included."""
        _check_ranks(batch_size, rank, world_size)
        total = -(-self.num_rows(split) // batch_size)
        return len(range(rank, total, world_size))

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        limit_batches: int | None = None,
    ) -> Iterator[ClickBatch]:
        """One epoch of ``split`` as batches of ``batch_size`` rows (the last may be smaller).

        Args:
            shuffle_seed: None for time order, else the seed of the order (see the module's text); use a new
                one each epoch.
            start_batch: the first batch to give, counted on this rank: where a stopped run goes on. Batches
                before it are not decoded.
            limit_batches: the epoch's length on this rank, counted from batch 0: a run resumed at
                ``start_batch`` ends where the unbroken run would have ended.

        Raises:
            DataError: naming file, column and row, for a damaged file, a label other than 0 and 1, an id
                outside [0, num_embeddings), or a dense value that is not finite.
        """
        count = self.num_batches(split, batch_size, rank, world_size)
        if start_batch < 0 or (limit_batches is not None and limit_batches < 0):
            raise ConfigError(
                f"start_batch {start_batch} and limit_batches {limit_batches} must not be negative"
            )
        if limit_batches is not None:
            count = min(count, limit_batches)
        # not itself a generator, so that wrong arguments are reported by the call and not by the first next()
        return self._assemble(split, batch_size, shuffle_seed, range(start_batch, count), (rank, world_size))

    def _assemble(
        self, split: str, batch_size: int, shuffle_seed: int | None, wanted: range, ranks: tuple[int, int]
    ) -> Iterator[ClickBatch]:
        rank, world_size = ranks
        windows = self._windows(split, shuffle_seed)
        starts = np.cumsum([0, *(sum(group.rows for group in window) for window in windows)]).tolist()
        loaded: dict[int, Rows] = {}
        for step in wanted:
            first = (step * world_size + rank) * batch_size
            last = min(first + batch_size, starts[-1])
            batch = ClickBatch(
                dense=np.empty((last - first, NUM_DENSE), np.float32),
                ids=np.empty((len(self.feature_names), last - first), np.int64),
                labels=np.empty(last - first, np.float32),
            )
            window = bisect.bisect_right(starts, first) - 1
            for done in [index for index in loaded if index < window]:
                del loaded[done]
            while window < len(windows) and starts[window] < last:
                if window not in loaded:
                    loaded[window] = self._load_window(windows[window], shuffle_seed, window)
                rows = loaded[window]
                begin, end = max(first, starts[window]), min(last, starts[window + 1])
                source = slice(begin - starts[window], end - starts[window])
                target = slice(begin - first, end - first)
                batch.dense[target] = rows.dense[:, source].T
                batch.ids[:, target] = rows.ids[:, source]
                batch.labels[target] = rows.labels[source]
                window += 1
            yield batch

    def _windows(self, split: str, shuffle_seed: int | None) -> list[list[_RowGroup]]:
        groups = self._split_groups(split)
        if shuffle_seed is None:
            return [[group] for group in groups]
        order = np.random.Generator(np.random.Philox(key=[shuffle_seed % 2**64, 0])).permutation(len(groups))
        shuffled = [groups[index] for index in order]
        size = SHUFFLE_WINDOW_ROW_GROUPS
        return [shuffled[begin : begin + size] for begin in range(0, len(shuffled), size)]

    def _load_window(self, groups: list[_RowGroup], shuffle_seed: int | None, window: int) -> Rows:
        pieces = [self._read(group) for group in groups]
        if shuffle_seed is None:
            return pieces[0]
        rows = Rows(
            labels=np.concatenate([piece.labels for piece in pieces]),
            dense=np.concatenate([piece.dense for piece in pieces], axis=1),
            ids=np.concatenate([piece.ids for piece in pieces], axis=1),
        )
        del pieces
        generator = np.random.Generator(np.random.Philox(key=[shuffle_seed % 2**64, window + 1]))
        order = generator.permutation(rows.labels.size)
        for matrix in (rows.dense, rows.ids):
            for index in range(len(matrix)):
                matrix[index] = matrix[index][order]
        return Rows(labels=rows.labels[order], dense=rows.dense, ids=rows.ids)

    def _read(self, group: _RowGroup) -> Rows:
        if group in self._memory:
            return self._memory[group]
        part = self._files.pop(group.part.name, None) or PartFile(self.path, group.part, self._schema)
        self._files[group.part.name] = part
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        rows = part.read_row_group(group.index)
        self._check_values(group, rows)
        if self._keep:
            self._memory[group] = rows
        return rows

    def _check_values(self, group: _RowGroup, rows: Rows) -> None:
        if rows.labels.max(initial=0) > 1:
            raise self._bad_value(group, LABEL_NAME, rows.labels, rows.labels > 1, "is neither 0 nor 1")
        for name, values in zip(DENSE_NAMES, rows.dense, strict=True):
            finite = np.isfinite(values)
            if not finite.all():
                raise self._bad_value(group, name, values, ~finite, "is not finite")
        for name, num_embeddings, ids in zip(
            CATEGORICAL_NAMES, self.num_embeddings_per_feature, rows.ids, strict=True
        ):
            if ids.min(initial=0) < 0 or ids.max(initial=0) >= num_embeddings:
                bad = (ids < 0) | (ids >= num_embeddings)
                raise self._bad_value(group, name, ids, bad, f"is outside [0, {num_embeddings})")

    def _bad_value(
        self, group: _RowGroup, column: str, values: npt.NDArray[Any], bad: npt.NDArray[np.bool_], rule: str
    ) -> DataError:
        row = int(np.flatnonzero(bad)[0])
        position = sum(group.part.row_group_rows[: group.index]) + row
        return DataError(
            f"{self.path / group.part.name}: column {column}, row {position}: {values[row]} {rule}; "
            "prepare the directory again"
        )

    def _split_groups(self, split: str) -> list[_RowGroup]:
        if split not in self._groups:
            raise ConfigError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
        return self._groups[split]


def _check_ranks(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} must be at least 1")
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} must be in [0, world_size) and world_size {world_size} at least 1")


def _check_stats(path: Path, stats: Any) -> dict[str, list[PartInfo]]:
    """The parts of each split in ``stats.json``; :class:`DataError` for missing or contradictory entries."""
    if not isinstance(stats, dict) or stats.get("format_version") != FORMAT_VERSION:
        version = stats.get("format_version") if isinstance(stats, dict) else None
        raise DataError(
            f"{path}: format version {version}, this recemb reads {FORMAT_VERSION}; prepare it again"
        )
    try:
        names = [feature["name"] for feature in stats["features"]]
        sizes = [feature["num_embeddings"] for feature in stats["features"]]
        parts = {
            split: [PartInfo.from_json(part) for part in stats["files"].get(split, [])] for split in SPLITS
        }
        rows = {split: int(stats["rows"].get(split, 0)) for split in SPLITS}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: damaged ({type(error).__name__}: {error}); prepare the directory again"
        ) from None
    if names != list(CATEGORICAL_NAMES) or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise DataError(f"{path}: damaged (its features are not cat_0..cat_25 with num_embeddings >= 1)")
    for split in SPLITS:
        found = sum(part.rows for part in parts[split])
        if found != rows[split]:
            raise DataError(f"{path}: the files of {split} hold {found} rows, its row count is {rows[split]}")
    return parts
