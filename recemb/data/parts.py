"""Parquet parts: the schema of a click log, writing one part, and reading it back with every byte checked.

Parquet has no checksum over a whole file: one flipped bit in a data page can decode to other values without
an error. ``stats.json`` therefore holds a CRC-32 of every row group (with what lies between it and the next
one) and of the footer, so that together they cover the file from its first byte to its last. The footer is
checked when a log is opened, a row group each time it is read.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recemb.data.layout import CATEGORICAL_NAMES, DENSE_NAMES, LABEL_NAME
from recemb.errors import DataError
from recemb.files import commit_file

_FOOTER_TAIL = 8  # int32 length of the footer's metadata, then b"PAR1"


@dataclass(frozen=True)
class PartInfo:
    """What ``stats.json`` knows about one part; ``name`` is relative to the prepared directory."""

    name: str
    rows: int
    bytes: int
    footer_crc32: int
    row_group_rows: tuple[int, ...]
    row_group_crc32: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The entry of ``stats.json``, with lists as JSON has them."""
        return {
            **asdict(self),
            "row_group_rows": list(self.row_group_rows),
            "row_group_crc32": list(self.row_group_crc32),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PartInfo:
        """The inverse of :meth:`to_json`; KeyError, TypeError or ValueError when ``value`` is damaged."""
        return cls(
            name=str(value["name"]),
            rows=int(value["rows"]),
            bytes=int(value["bytes"]),
            footer_crc32=int(value["footer_crc32"]),
            row_group_rows=tuple(int(rows) for rows in value["row_group_rows"]),
            row_group_crc32=tuple(int(crc) for crc in value["row_group_crc32"]),
        )


@dataclass(frozen=True)
class Rows:
    """``n`` decoded rows: labels uint8 [n], dense float32 [13, n], ids integer [F, n]."""

    labels: npt.NDArray[np.uint8]
    dense: npt.NDArray[np.float32]
    ids: npt.NDArray[np.signedinteger[Any]]


def click_log_schema(num_embeddings: Sequence[int]) -> Any:
    """The Arrow schema of a click log: an id column is int32 where its ids fit, else int64."""
    id_types = [pa.int32() if rows <= 2**31 else pa.int64() for rows in num_embeddings]
    return pa.schema(
        [
            pa.field(LABEL_NAME, pa.uint8(), nullable=False),
            *(pa.field(name, pa.float32(), nullable=False) for name in DENSE_NAMES),
            *(
                pa.field(name, id_type, nullable=False)
                for name, id_type in zip(CATEGORICAL_NAMES, id_types, strict=True)
            ),
        ]
    )


def rows_to_table(rows: Rows, schema: Any) -> Any:
    """Arrow table of ``rows``; an id that its column's type cannot hold is an ArrowInvalid, never wrapped."""
    columns = [pa.array(rows.labels), *(pa.array(column) for column in rows.dense)]
    first_id = len(columns)
    columns += [
        pa.array(ids).cast(schema.field(first_id + feature).type, safe=True)
        for feature, ids in enumerate(rows.ids)
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def write_part(root: Path, name: str, schema: Any, tables: Iterable[Any]) -> PartInfo:
    """Write ``tables`` (one row group each) to ``root/name`` atomically and return its fingerprint."""
    final = root / name
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp")
    with pq.ParquetWriter(temporary, schema, compression="zstd", compression_level=1) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(table.num_rows, 1))
    info = fingerprint(temporary, name)
    commit_file(temporary, final)
    return info


def _row_group_ends(metadata: Any, footer_start: int) -> list[int]:
    """Byte offset where each row group's checked range ends; the first range starts at byte 0."""
    starts = []
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(column) for column in range(metadata.num_columns)]
        # a column without a dictionary page has None there
        starts.append(min(column.dictionary_page_offset or column.data_page_offset for column in columns))
    return [*starts[1:], footer_start]


def fingerprint(path: Path, name: str) -> PartInfo:
    """Rows, size and checksums of the Parquet file ``path``, recorded under ``name``."""
    size = path.stat().st_size
    metadata = pq.read_metadata(path)
    footer_start = size - _FOOTER_TAIL - metadata.serialized_size
    checksums = []
    with open(path, "rb") as handle:
        for end in _row_group_ends(metadata, footer_start):
            checksums.append(zlib.crc32(handle.read(end - handle.tell())))
        handle.seek(footer_start)
        footer = handle.read()
    return PartInfo(
        name=name,
        rows=metadata.num_rows,
        bytes=size,
        footer_crc32=zlib.crc32(footer),
        row_group_rows=tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)),
        row_group_crc32=tuple(checksums),
    )


class PartFile:
    """One part, open for reading.

    Raises:
        DataError: naming the file, when it is missing, truncated, of another schema, or when a checksum
            differs.
    """

    def __init__(self, root: Path, info: PartInfo, schema: Any) -> None:
        self._info = info
        self.path = root / info.name
        self._schema = schema
        try:
            self._handle = open(self.path, "rb")  # noqa: SIM115 - lives as long as this object
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}; prepare the directory again") from None
        try:
            self._check_size()
            footer_start = self._check_footer()
            self._parquet = pq.ParquetFile(self._handle, pre_buffer=False)
            self._check_contents(footer_start)
        except (pa.ArrowException, OSError) as error:
            self._handle.close()
            raise self._damaged(str(error)) from None
        except DataError:
            self._handle.close()
            raise

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self.path}: damaged ({what}); restore the file or prepare the directory again")

    def _check_size(self) -> None:
        size = os.fstat(self._handle.fileno()).st_size
        if size != self._info.bytes:
            raise self._damaged(f"{size} bytes, stats.json says {self._info.bytes}")

    def _check_footer(self) -> int:
        """Where the footer begins; its checksum is compared before Arrow parses a byte of it."""
        tail = os.pread(self._handle.fileno(), _FOOTER_TAIL, self._info.bytes - _FOOTER_TAIL)
        size = _FOOTER_TAIL + int.from_bytes(tail[:4], "little")
        start = max(self._info.bytes - size, 0)
        if zlib.crc32(os.pread(self._handle.fileno(), size, start)) != self._info.footer_crc32:
            raise self._damaged("the checksum of its footer differs from stats.json")
        return start

    def _check_contents(self, footer_start: int) -> None:
        metadata = self._parquet.metadata
        if not self._parquet.schema_arrow.equals(self._schema):
            raise DataError(
                f"{self.path}: its columns differ from the other files: "
                f"{_schema_difference(self._parquet.schema_arrow, self._schema)}"
            )
        rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        if rows != self._info.row_group_rows or sum(rows) != self._info.rows:
            raise self._damaged(f"{sum(rows)} rows, stats.json says {self._info.rows}")
        ends = _row_group_ends(metadata, footer_start)
        self._ranges = list(zip([0, *ends[:-1]], ends, strict=True))

    def close(self) -> None:
        """Release the file."""
        self._parquet.close()
        self._handle.close()

    def read_row_group(self, group: int) -> Rows:
        """Decode row group ``group`` after checking its bytes; :class:`DataError` names the file."""
        start, end = self._ranges[group]
        try:
            self._check_size()
            if (
                zlib.crc32(os.pread(self._handle.fileno(), end - start, start))
                != self._info.row_group_crc32[group]
            ):
                raise self._damaged(f"the checksum of row group {group} differs from stats.json")
            table = self._parquet.read_row_group(group, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(str(error)) from None
        for column, name in zip(table.columns, table.column_names, strict=True):
            if column.null_count:
                raise DataError(f"{self.path}: column {name} has {column.null_count} empty values")
        labels = table.column(LABEL_NAME).to_numpy()
        dense = np.stack([table.column(name).to_numpy() for name in DENSE_NAMES])
        ids = np.stack([table.column(name).to_numpy() for name in CATEGORICAL_NAMES])
        return Rows(labels=labels, dense=dense, ids=ids)


def _schema_difference(found: Any, expected: Any) -> str:
    """The first column in which two schemas differ, in words."""
    if found.names != expected.names:
        missing = [name for name in expected.names if name not in found.names]
        extra = [name for name in found.names if name not in expected.names]
        return f"missing {missing}, unexpected {extra}" if missing or extra else "the order of the columns"
    for name in expected.names:
        if not found.field(name).equals(expected.field(name)):
            return f"{found.field(name)!s} instead of {expected.field(name)!s}"
    return "schema metadata"
