"""Streaming reader of Criteo's click logs: Kaggle's train.txt and the 1TB log's day_N, plain or gzip.

A row has 40 tab-separated fields and no header: the label (0 or 1), 13 integers (any int64, or empty) and 26
categories (1 to 8 hexadecimal digits, or empty). Lines end in LF or CRLF; the last one may lack its ending.

A block of about 16 MB is parsed by Arrow's CSV reader, which accepts more than Criteo's format has (white
space, ``0x10``, quotes), so a block goes there only when it consists of the bytes that a row can have. Where
a block is refused it is halved until the halves that hold the bad lines are small, and those are parsed line
by line. The result is that of the line parser, at the speed of Arrow.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv

from recemb.data.criteo_rows import RAW_SCHEMA, BadRow, parse_lines
from recemb.data.layout import CATEGORICAL_NAMES, COLUMN_NAMES, DENSE_NAMES, LABEL_NAME
from recemb.errors import DataError

BLOCK_BYTES: Final = 16 << 20
_SMALL_LINES: Final = 64
_CSV_BLOCK_BYTES: Final = (
    1 << 20
)  # stays in cache; a longer line is refused, and so parsed by the line parser
_ROW_BYTES: Final = b"0123456789abcdefABCDEF-\t\n"
_GZIP_MAGIC: Final = b"\x1f\x8b"
_OTHER_MAGIC: Final = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ\x00": "xz-compressed",
    b"PAR1": "a Parquet file",
}
_TAR_MAGIC_OFFSET: Final = 257

_NOT_HEX: Final = 255
_HEX_VALUE: Final = np.full(256, _NOT_HEX, np.uint8)
for _digit in range(16):
    _HEX_VALUE[list(f"{_digit:x}{_digit:X}".encode())] = _digit

_CSV_READ: Final = {"column_names": list(COLUMN_NAMES)}
_CSV_PARSE: Final = pacsv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False)
_CSV_CONVERT: Final = pacsv.ConvertOptions(
    column_types={
        LABEL_NAME: pa.binary(),
        **dict.fromkeys(DENSE_NAMES, pa.int64()),
        **dict.fromkeys(CATEGORICAL_NAMES, pa.binary()),
    },
    null_values=[""],
    strings_can_be_null=True,
    check_utf8=False,
)


@dataclass(frozen=True)
class Block:
    """Parsed lines of one file.

    Attributes:
        table: the good rows, an Arrow table of :data:`~recemb.data.criteo_rows.RAW_SCHEMA`.
        bad_rows: the others, in order.
        end_line: lines of the file up to the end of this block.
        end_byte: bytes of the (unpacked) text up to the end of this block: where reading can go on.
        file_position: bytes of the file itself that were read so far, for a progress bar.
    """

    table: Any
    bad_rows: list[BadRow]
    end_line: int
    end_byte: int
    file_position: int


def read_blocks(path: Path, *, start_line: int = 0, start_byte: int = 0) -> Iterator[Block]:
    """Parse ``path``, from the end of an earlier block (its ``end_line`` and ``end_byte``) if given.

    Raises:
        DataError: naming the file, when it is missing, empty, a damaged or cut gzip file, or of another
            format. Bad rows are no error here: they are in the blocks.
    """
    try:
        with open(path, "rb") as file:
            text = _open_text(path, file)
            _skip(text, start_byte, path)
            yield from _read(path, file, text, start_line, start_byte)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut gzip file ({error}); download it again") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open_text(path: Path, file: io.BufferedReader) -> io.BufferedIOBase:
    head = file.read(_TAR_MAGIC_OFFSET + 5)
    file.seek(0)
    if not head:
        raise DataError(f"{path}: the file is empty")
    for magic, kind in _OTHER_MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{path}: is {kind}; unpack it, or give the gzip file or the plain text")
    if not head.startswith(_GZIP_MAGIC):
        _refuse_tar(path, head)
        return file
    text = gzip.GzipFile(fileobj=file)
    _refuse_tar(path, text.read(_TAR_MAGIC_OFFSET + 5))
    text.seek(0)
    return text


def _refuse_tar(path: Path, head: bytes) -> None:
    if not head:
        raise DataError(f"{path}: the file is empty")
    if head[_TAR_MAGIC_OFFSET:] == b"ustar":
        raise DataError(
            f"{path}: is a tar archive; unpack it (`tar xf {path}`) and give the train.txt inside"
        )


def _skip(text: io.BufferedIOBase, count: int, path: Path) -> None:
    if isinstance(text, gzip.GzipFile):
        while count > 0:
            skipped = len(text.read(min(count, BLOCK_BYTES)))
            if skipped == 0:
                raise DataError(f"{path}: shorter than when it was first read")
            count -= skipped
    else:
        text.seek(count)


def _read(
    path: Path, file: io.BufferedReader, text: io.BufferedIOBase, line: int, position: int
) -> Iterator[Block]:
    size = os.fstat(file.fileno()).st_size
    carry = b""
    while True:
        chunk = text.read(BLOCK_BYTES)
        data = carry + chunk
        if not chunk and data:
            data += b"\n"
        cut = data.rfind(b"\n") + 1
        carry = data[cut:]
        if cut:
            table, bad = _parse(data[:cut], str(path), line + 1, position)
            line += data.count(b"\n", 0, cut)
            position += cut if chunk else cut - 1
            yield Block(table, bad, line, position, min(file.tell(), size))
        if not chunk:
            return
        if len(carry) > BLOCK_BYTES:
            raise DataError(
                f"{path}, line {line + 1} (byte {position}): no line ending within {len(carry)} bytes; "
                "this is no Criteo log"
            )


def _parse(text: bytes, file: str, first_line: int, first_byte: int) -> tuple[Any, list[BadRow]]:
    """Parse ``text``, whole lines, by Arrow where that is exact and else by halves."""
    table = _parse_fast(text)
    if table is not None:
        return table, []
    middle = text.rfind(b"\n", 0, len(text) // 2) + 1
    lines_before = text.count(b"\n", 0, middle)
    if middle == 0 or text.count(b"\n") <= _SMALL_LINES:
        return parse_lines(text, file, first_line, first_byte)
    front, front_bad = _parse(text[:middle], file, first_line, first_byte)
    back, back_bad = _parse(text[middle:], file, first_line + lines_before, first_byte + middle)
    return pa.concat_tables([front, back]), front_bad + back_bad


def _parse_fast(text: bytes) -> Any | None:
    """The rows of ``text`` when all of it is well-formed for sure, else None."""
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n")
    if text.translate(None, _ROW_BYTES):
        return None
    try:
        table = pacsv.read_csv(
            pa.BufferReader(text),
            read_options=pacsv.ReadOptions(block_size=_CSV_BLOCK_BYTES, **_CSV_READ),
            parse_options=_CSV_PARSE,
            convert_options=_CSV_CONVERT,
        )
    except pa.ArrowInvalid:
        return None
    if table.num_rows != text.count(b"\n"):
        return None
    labels = _parse_labels(_one_array(table.column(0)))
    tokens = [_parse_hex(_one_array(table.column(name))) for name in CATEGORICAL_NAMES]
    if labels is None or any(column is None for column in tokens):
        return None
    dense = [table.column(name) for name in DENSE_NAMES]
    return pa.Table.from_arrays([labels, *dense, *tokens], schema=RAW_SCHEMA)


def _one_array(column: Any) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _text_of(column: Any) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """All bytes of a binary array, and where each of its n values begins (n + 1 offsets from 0)."""
    _, offsets_buffer, data_buffer = column.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32)[column.offset : column.offset + len(column) + 1]
    if data_buffer is None:
        return np.empty(0, np.uint8), offsets - offsets[0]
    return np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]], offsets - offsets[0]


def _parse_labels(column: Any) -> Any | None:
    data, offsets = _text_of(column)
    if data.size != len(column) or not (np.diff(offsets) == 1).all():
        return None
    labels = data - np.uint8(ord("0"))
    return pa.array(labels) if labels.size == 0 or labels.max() <= 1 else None


def _parse_hex(column: Any) -> Any | None:
    """uint32 array with nulls of a binary array of 0 to 8 hexadecimal digits; None when a value is not."""
    data, offsets = _text_of(column)
    digits = _HEX_VALUE[data]
    if (digits == _NOT_HEX).any():
        return None
    lengths = np.diff(offsets)
    full = lengths == 8
    tokens = np.zeros(lengths.size, np.uint32)
    if int(full.sum()) * 8 == data.size:
        pairs = digits.reshape(-1, 2)
        tokens[full] = ((pairs[:, 0] << 4) | pairs[:, 1]).view(">u4")
    elif int(lengths.max(initial=0)) > 8:
        return None
    else:
        starts = offsets[:-1]
        for place in range(8):
            longer = lengths > place
            tokens[longer] = (tokens[longer] << np.uint32(4)) | digits[starts[longer] + place]
    return pa.array(tokens, mask=lengths == 0)
