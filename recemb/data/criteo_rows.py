"""One line of Criteo's TSV, parsed by the letter: the fast reader's fallback, which explains a bad row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from recemb.data.layout import CATEGORICAL_NAMES, COLUMN_NAMES, DENSE_NAMES, LABEL_NAME, NUM_DENSE, NUM_FIELDS
from recemb.errors import DataError

_INTEGER: Final = re.compile(rb"-?[0-9]+")
_HEX: Final = re.compile(rb"[0-9a-fA-F]{1,8}")
_BOM: Final = b"\xef\xbb\xbf"
_SHOWN_BYTES: Final = 40
_KEPT_BYTES: Final = 4096

# What an unmapped Criteo log holds: integers as they are, categories as numbers below 2^32, null for an empty
# field.
RAW_SCHEMA: Final = pa.schema(
    [
        pa.field(LABEL_NAME, pa.uint8(), nullable=False),
        *(pa.field(name, pa.int64()) for name in DENSE_NAMES),
        *(pa.field(name, pa.uint32()) for name in CATEGORICAL_NAMES),
    ]
)


@dataclass(frozen=True)
class BadRow:
    """A line that is no Criteo row.

    Attributes:
        file: its path.
        line: counted from 1.
        byte_offset: of its first byte, in the unpacked text when the file is compressed.
        reason: what is wrong, in words.
        content: the line's bytes without its ending, the first 4096 at most.
    """

    file: str
    line: int
    byte_offset: int
    reason: str
    content: bytes

    def to_json(self) -> dict[str, Any]:
        """The entry of ``rejects.jsonl``; bytes that are not UTF-8 are written as ``\\xNN``."""
        return {
            "file": self.file,
            "line": self.line,
            "byte_offset": self.byte_offset,
            "reason": self.reason,
            "content": self.content.decode("utf-8", errors="backslashreplace"),
        }

    def to_error(self) -> DataError:
        """The error that ``--bad_rows error`` stops with."""
        return DataError(
            f"{self.file}, line {self.line} (byte {self.byte_offset}): {self.reason}; mend the file, or "
            "leave such rows out with --bad_rows skip"
        )


def _shown(field: bytes) -> str:
    text = field[:_SHOWN_BYTES].decode("ascii", errors="backslashreplace")
    return repr(text + ("..." if len(field) > _SHOWN_BYTES else ""))


def parse_line(line: bytes) -> list[int | None] | str:
    """The 40 values of ``line`` (without its ending), None for an empty field; or why it is no row."""
    if not line:
        return "blank line"
    if line.startswith(_BOM):
        return "begins with a byte-order mark"
    if b"\x00" in line:
        return "contains a NUL byte"
    if b"\r" in line:
        return "contains a carriage return that is not part of a CRLF line ending"
    fields = line.split(b"\t")
    if len(fields) != NUM_FIELDS:
        hint = " (Criteo's test.txt has no label)" if len(fields) == NUM_FIELDS - 1 else ""
        return f"{len(fields)} fields instead of {NUM_FIELDS}{hint}"
    if fields[0] not in (b"0", b"1"):
        return f"field 1 ({LABEL_NAME}): {_shown(fields[0])} is neither 0 nor 1"
    values: list[int | None] = [int(fields[0])]
    for position, field in enumerate(fields[1:], start=1):
        value, problem = _integer(field) if position <= NUM_DENSE else _category(field)
        if problem:
            return f"field {position + 1} ({COLUMN_NAMES[position]}): {_shown(field)} {problem}"
        values.append(value)
    return values


def _integer(field: bytes) -> tuple[int | None, str]:
    if not field:
        return None, ""
    if not _INTEGER.fullmatch(field):
        return None, "is not an integer"
    # int() refuses more than 4300 digits; 19 significant ones are all that an int64 can have
    digits = field.lstrip(b"-").lstrip(b"0")
    value = int(digits or b"0") if len(digits) <= 19 else 2**64
    if field.startswith(b"-"):
        value = -value
    if not -(2**63) <= value < 2**63:
        return None, "does not fit int64"
    return value, ""


def _category(field: bytes) -> tuple[int | None, str]:
    if not field:
        return None, ""
    if not _HEX.fullmatch(field):
        return None, "is not 1 to 8 hexadecimal digits"
    return int(field, 16), ""


def parse_lines(text: bytes, file: str, first_line: int, first_byte: int) -> tuple[Any, list[BadRow]]:
    """Arrow table (:data:`RAW_SCHEMA`) of the good rows of ``text`` and the bad ones, line by line.

    Every line of ``text`` ends in a newline. ``first_line`` and ``first_byte`` are the position of its
    beginning.
    """
    rows: list[list[int | None]] = []
    bad = []
    offset = first_byte
    for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), start=first_line):
        content = line.removesuffix(b"\r")
        parsed = parse_line(content)
        if isinstance(parsed, str):
            bad.append(BadRow(file, number, offset, parsed, content[:_KEPT_BYTES]))
        else:
            rows.append(parsed)
        offset += len(line) + 1
    columns = zip(*rows, strict=True) if rows else ((),) * NUM_FIELDS
    arrays = [pa.array(column, field.type) for column, field in zip(columns, RAW_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=RAW_SCHEMA), bad
