"""Stage 1 of ``recemb prepare``: parse the TSV files once, into resumable Parquet parts of raw values.

Decompressing and parsing text is the slow part, and the training split is known only when all rows are
counted, so
the later stages read these parts: a column at a time to count tokens, then all columns to write ids. After
each part a small JSON file records where in the input it ends; a killed run goes on from the last one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from recemb.data.criteo import read_blocks
from recemb.data.criteo_rows import RAW_SCHEMA, BadRow
from recemb.data.layout import DENSE_NAMES, PART_ROWS, read_json, write_json
from recemb.errors import ConfigError, DataError
from recemb.files import commit_file


@dataclass
class RawPart:
    """A finished part: rows of input ``source`` up to ``end_line`` and ``end_byte``; ``last`` of its file?"""

    index: int
    source: int
    end_line: int = 0
    end_byte: int = 0
    file_position: int = 0
    rows: int = 0
    rejects: int = 0
    clicks: int = 0
    last: bool = False
    missing_dense: list[int] = field(default_factory=lambda: [0] * len(DENSE_NAMES))


class RawLog:
    """The raw parts below ``directory``.

    Args:
        directory: of the parts; made when missing.
        inputs: the TSV files in time order.
        max_bad_rows: None stops at the first bad row, else more than so many do.
    """

    def __init__(self, directory: Path, inputs: Sequence[Path], max_bad_rows: int | None) -> None:
        directory.mkdir(exist_ok=True)
        self._directory: Final = directory
        self._inputs: Final = list(inputs)
        self._max_bad_rows: Final = max_bad_rows
        self.parts: list[RawPart] = []
        while (path := self._state_path(len(self.parts))).exists():
            self.parts.append(RawPart(**read_json(path)))
        if max_bad_rows is None and self.rejects:
            raise ConfigError(
                f"{directory.parent.parent}: begun with --bad_rows skip, {self.rejects} bad rows were left "
                "out so far; give --bad_rows skip again, or remove the directory to start over"
            )
        self._check_limit(None, self.rejects)

    @property
    def num_rows(self) -> int:
        """Good rows so far."""
        return sum(part.rows for part in self.parts)

    @property
    def rejects(self) -> int:
        """Bad rows so far."""
        return sum(part.rejects for part in self.parts)

    def _state_path(self, index: int) -> Path:
        return self._directory / f"part-{index:05d}.json"

    def _part_path(self, index: int) -> Path:
        return self._directory / f"part-{index:05d}.parquet"

    def _rejects_path(self, index: int) -> Path:
        return self._directory / f"rejects-{index:05d}.jsonl"

    def parse(self, progress: bool) -> None:
        """Parse what is not parsed yet; :class:`DataError` for a bad row or file (see :class:`BadRow`)."""
        total = sum(path.stat().st_size for path in self._inputs)
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="parse", disable=None if progress else True
        ) as bar:
            finished_bytes = 0
            for source, path in enumerate(self._inputs):
                mine = [part for part in self.parts if part.source == source]
                if not (mine and mine[-1].last):
                    self._parse_file(source, mine[-1] if mine else RawPart(-1, source), bar, finished_bytes)
                finished_bytes += path.stat().st_size
                bar.update(finished_bytes - bar.n)
        if self.num_rows == 0:
            raise DataError(f"{', '.join(map(str, self._inputs))}: no good row in {self.rejects} lines")

    def _parse_file(self, source: int, after: RawPart, bar: Any, finished_bytes: int) -> None:
        blocks = read_blocks(self._inputs[source], start_line=after.end_line, start_byte=after.end_byte)
        block = next(blocks, None)
        while True:
            part = RawPart(len(self.parts), source, after.end_line, after.end_byte, after.file_position)
            temporary = self._directory / "part.tmp"
            rejects: list[BadRow] = []
            with pq.ParquetWriter(temporary, RAW_SCHEMA, compression="zstd", compression_level=1) as writer:
                while block is not None and part.rows < PART_ROWS:
                    self._check_limit(block.bad_rows, self.rejects + len(rejects))
                    rejects += block.bad_rows
                    if block.table.num_rows:
                        writer.write_table(block.table, row_group_size=block.table.num_rows)
                    _account(part, block.table)
                    part.end_line, part.end_byte = block.end_line, block.end_byte
                    part.file_position = block.file_position
                    bar.update(finished_bytes + block.file_position - bar.n)
                    block = next(blocks, None)
            part.last, part.rejects = block is None, len(rejects)
            commit_file(temporary, self._part_path(part.index))
            self._write_rejects(part.index, rejects)
            write_json(self._state_path(part.index), asdict(part))
            self.parts.append(part)
            if part.last:
                return
            after = part

    def _check_limit(self, bad_rows: list[BadRow] | None, before: int) -> None:
        if self._max_bad_rows is None:
            if bad_rows:
                raise bad_rows[0].to_error()
            return
        allowed = self._max_bad_rows - before
        if bad_rows is not None and len(bad_rows) > allowed:
            row = bad_rows[allowed]
            raise DataError(
                f"{row.file}, line {row.line} (byte {row.byte_offset}): {row.reason}; more than "
                f"--max_bad_rows {self._max_bad_rows} bad rows"
            )
        if allowed < 0:
            raise ConfigError(f"--max_bad_rows {self._max_bad_rows}: {before} bad rows were already left out")

    def _write_rejects(self, index: int, rejects: list[BadRow]) -> None:
        path = self._rejects_path(index)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as handle:
            for row in rejects:
                handle.write(json.dumps(row.to_json()) + "\n")
        commit_file(temporary, path)

    def collect_rejects(self, target: Path) -> None:
        """Write all bad rows to ``target``; nothing when there are none."""
        if not self.rejects:
            return
        temporary = target.with_name(f".{target.name}.tmp")
        with open(temporary, "wb") as out:
            for part in self.parts:
                out.write(self._rejects_path(part.index).read_bytes())
        commit_file(temporary, target)

    def row_groups(self, rows: range, columns: Sequence[str]) -> Iterator[Any]:
        """Arrow tables of ``columns`` for the rows [rows.start, rows.stop) of the log, in order."""
        start = 0
        for part in self.parts:
            end = start + part.rows
            if end > rows.start and start < rows.stop and part.rows:
                yield from self._part_row_groups(part, range(rows.start - start, rows.stop - start), columns)
            start = end

    def _part_row_groups(self, part: RawPart, rows: range, columns: Sequence[str]) -> Iterator[Any]:
        with pq.ParquetFile(self._part_path(part.index), pre_buffer=False) as parquet:
            start = 0
            for group in range(parquet.metadata.num_row_groups):
                end = start + parquet.metadata.row_group(group).num_rows
                first, last = max(start, rows.start), min(end, rows.stop)
                if first < last:
                    table = parquet.read_row_group(group, columns=list(columns))
                    yield table.slice(first - start, last - first)
                start = end

    def chunks(self, rows: range, size: int) -> Iterator[Any]:
        """The same rows with all columns in tables of exactly ``size`` rows (the last may be smaller)."""
        pending: list[Any] = []
        count = 0
        for table in self.row_groups(rows, RAW_SCHEMA.names):
            pending.append(table)
            count += table.num_rows
            while count >= size:
                joined = pa.concat_tables(pending)
                yield joined.slice(0, size)
                pending, count = [joined.slice(size)], count - size
        if count:
            yield pa.concat_tables(pending)


def _account(part: RawPart, table: Any) -> None:
    part.rows += table.num_rows
    part.clicks += sum(int(chunk.to_numpy().sum()) for chunk in table.column(0).chunks)
    for index, name in enumerate(DENSE_NAMES):
        part.missing_dense[index] += table.column(name).null_count
