"""From a feature's token counts to its ids: what is kept, in which order, and the files that record it.

* Row 0 is out-of-vocabulary (OOV): tokens counted fewer than ``min_count`` times in the training split, and
  all that the training split does not have.
* The kept tokens get the ids 1, 2, ... by falling count, equal counts by rising token: rows that are looked
  up often are neighbours, in caches, in tensor-train prefixes and in the pages of a file.
* The empty field is a token like the others, above all 32-bit ones in the order, null in the vocabulary file.
* ``max_ind_range`` N keeps the N - 1 most frequent tokens, so that a table has at most N rows. (dlrm's option
  of that name takes ids modulo N, which gives unrelated tokens one row; here the rare ones share the OOV
  row.)

The id of a token with count c is one more than the number of kept tokens with a larger count plus the number
of kept tokens before it with the same count. The first is known from the histogram of counts, the second by
counting while the tokens stream by in token order, so nothing of the vocabulary's size is held in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recemb.data.layout import OOV_ID
from recemb.data.statistics import CountHistogram, frequency_summary
from recemb.data.token_counts import CountRun, Counts, Tokens
from recemb.files import commit_file, sync_file

VOCABULARY_SCHEMA: Final = pa.schema(
    [pa.field("token", pa.uint32()), pa.field("count", pa.int64(), nullable=False)]
)
_VOCABULARY_ROW_GROUP: Final = 1 << 18  # fixed, so that the file does not depend on the memory budget


def id_dtype(num_embeddings: int) -> np.dtype[Any]:
    """Little-endian int32 where the ids of ``num_embeddings`` rows fit, else int64."""
    return np.dtype("<i4") if num_embeddings <= 2**31 else np.dtype("<i8")


@dataclass(frozen=True)
class IdAssignment:
    """Which id each count's tokens begin at.

    Attributes:
        counts: int64 [C], the distinct counts that are kept, falling.
        first_ids: int64 [C], the id of the first token with that count.
        num_embeddings: kept tokens + 1.
    """

    counts: Counts
    first_ids: npt.NDArray[np.int64]
    num_embeddings: int

    @classmethod
    def by_frequency(cls, histogram: Counter[int], min_count: int, max_ind_range: int | None) -> IdAssignment:
        """From ``{count: tokens}``, the empty field included."""
        kept = CountHistogram.of_mapping(
            {count: rows for count, rows in histogram.items() if count >= min_count}
        )
        first_ids = 1 + np.cumsum(kept.rows) - kept.rows
        rows = kept.num_rows + 1
        return cls(kept.counts, first_ids, min(rows, max_ind_range) if max_ind_range else rows)

    def ids(self, counts: Counts, seen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Ids of the next tokens in token order, from their counts [n]; OOV_ID for what is not kept.

        ``seen`` int64 [C] holds how many tokens of each count came before; it is updated.
        """
        # counts fall, searchsorted needs them rising
        bucket = self.counts.size - 1 - np.searchsorted(self.counts[::-1], counts)
        known = np.flatnonzero(bucket >= 0)
        known = known[self.counts[bucket[known]] == counts[known]]
        bucket = bucket[known]
        order = np.argsort(bucket, kind="stable")
        sizes = np.bincount(bucket, minlength=self.counts.size)
        rank_in_block = np.arange(known.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ids = np.full(counts.size, OOV_ID, np.int64)
        sorted_buckets = bucket[order]
        ids[known[order]] = self.first_ids[sorted_buckets] + seen[sorted_buckets] + rank_in_block
        seen += sizes
        ids[ids >= self.num_embeddings] = OOV_ID
        return ids


@dataclass(frozen=True)
class FeatureVocabulary:
    """A feature's finished vocabulary: what :class:`recemb.data.token_map.TokenMap` and the stats need."""

    name: str
    num_embeddings: int
    map_entries: int
    missing_id: int
    summary: dict[str, Any]


def write_vocabulary(
    name: str,
    counted: tuple[CountRun, Counter[int]],
    missing: int,
    limits: tuple[int, int | None],
    paths: tuple[Path, Path],
    block: int,
) -> FeatureVocabulary:
    """Give ids to the counted tokens of feature ``name`` and write its vocabulary and its token map.

    Args:
        counted: result of :meth:`TokenCounter.finish`.
        missing: look-ups with an empty field.
        limits: min_count, max_ind_range.
        paths: the vocabulary file (Parquet: token, count, in id order; row r has id r + 1) and the prefix of
            the map files (``.tokens`` rising, ``.ids``).
        block: entries handled at a time.
    """
    run, token_histogram = counted
    vocabulary_path, map_path = paths
    histogram = token_histogram + Counter({missing: 1} if missing else {})
    assignment = IdAssignment.by_frequency(histogram, *limits)
    dtype = id_dtype(assignment.num_embeddings)
    seen = np.zeros(assignment.counts.size, np.int64)
    by_id_path = Path(f"{map_path}.by_id")
    num_kept = assignment.num_embeddings - 1
    by_id_path.write_bytes(b"")
    entries = 0
    with open(f"{map_path}.tokens", "wb") as token_file, open(f"{map_path}.ids", "wb") as id_file:
        with open(by_id_path, "r+b") as handle:
            handle.truncate(4 * num_kept)
        for tokens, counts in run.blocks(block):
            ids = assignment.ids(counts, seen)
            kept = ids != OOV_ID
            tokens, ids = tokens[kept], ids[kept]
            tokens.astype("<u4").tofile(token_file)
            ids.astype(dtype).tofile(id_file)
            entries += tokens.size
            _scatter(by_id_path, tokens, ids, block)
    for suffix in (".tokens", ".ids"):
        sync_file(Path(f"{map_path}{suffix}"))
    missing_id = int(assignment.ids(np.array([missing], np.int64), seen)[0]) if missing else OOV_ID
    table_histogram = _write_parquet(vocabulary_path, by_id_path, assignment, histogram, missing_id)
    by_id_path.unlink()
    tokens_histogram = CountHistogram.of_mapping(histogram)
    table_rows = table_histogram.with_row(tokens_histogram.lookups - table_histogram.lookups)
    summary = {
        "distinct": tokens_histogram.num_rows,
        "missing": missing,
        "missing_id": missing_id,
        **frequency_summary(table_rows, tokens_histogram),
    }
    return FeatureVocabulary(name, assignment.num_embeddings, entries, missing_id, summary)


def _scatter(by_id_path: Path, tokens: Tokens, ids: npt.NDArray[np.int64], window: int) -> None:
    """``file[id - 1] = token``, one window mapped at a time: mapped pages count as memory in use."""
    order = np.argsort(ids)
    positions, tokens = ids[order] - 1, tokens[order]
    start = 0
    while start < positions.size:
        base = int(positions[start]) // window * window
        end = int(np.searchsorted(positions, base + window))
        size = min(window, by_id_path.stat().st_size // 4 - base)
        target = np.memmap(by_id_path, "<u4", "r+", offset=4 * base, shape=(size,))
        target[positions[start:end] - base] = tokens[start:end]
        del target
        start = end


def _write_parquet(
    path: Path,
    by_id_path: Path,
    assignment: IdAssignment,
    histogram: Counter[int],
    missing_id: int,
) -> CountHistogram:
    """Write tokens and counts in id order; returns the histogram of the kept tokens."""
    num_kept = assignment.num_embeddings - 1
    sizes = np.array([histogram[count] for count in assignment.counts.tolist()], np.int64)
    kept_sizes = np.clip(num_kept + 1 - assignment.first_ids, 0, sizes)
    ends = np.cumsum(kept_sizes)
    temporary = path.with_name(f".{path.name}.tmp")
    with pq.ParquetWriter(temporary, VOCABULARY_SCHEMA, compression="zstd") as writer:
        for start in range(0, num_kept, _VOCABULARY_ROW_GROUP):
            size = min(_VOCABULARY_ROW_GROUP, num_kept - start)
            tokens = np.fromfile(by_id_path, "<u4", size, offset=4 * start)
            counts = assignment.counts[np.searchsorted(ends, np.arange(start, start + size), side="right")]
            mask = np.arange(start + 1, start + 1 + size) == missing_id
            writer.write_table(
                pa.Table.from_arrays(
                    [pa.array(tokens, mask=mask), pa.array(counts)], schema=VOCABULARY_SCHEMA
                )
            )
    commit_file(temporary, path)
    return CountHistogram(assignment.counts, kept_sizes)


def read_vocabulary(path: Path) -> Iterator[tuple[int, int | None, int]]:
    """(id, token or None for the empty field, count) of every kept token, in id order."""
    next_id = 1
    for batch in pq.ParquetFile(path).iter_batches():
        for token, count in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
            yield next_id, token, count
            next_id += 1
