"""The TSV reader against the oracle: every row of every mutated file, and the reasons given (F1, F2)."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.data import criteo as reader
from recemb.errors import DataError


def read(path: Path, **position: int) -> tuple[list[list[int | None]], list[Any], list[Any]]:
    """Rows, bad rows and blocks of a file."""
    blocks = list(reader.read_blocks(path, **position))
    rows = [list(row.values()) for block in blocks for row in block.table.to_pylist()]
    return rows, [bad for block in blocks for bad in block.bad_rows], blocks


BAD_FIELDS = [
    b"1.5",
    b" 1",
    b"1 ",
    b"+1",
    b"0x1F",
    b"1e3",
    b"--1",
    b"-",
    b'"1"',
    b"9223372036854775808",
    b"abc",
    b"-9223372036854775809",
    b"\x00",
    b"1\r",
    b"NaN",
    b"null",
    b"\xef\xbb\xbf1",
    b"1" * 30,
    b"\xff",
    b"g0",
    b"123456789",
    b"-1",
    b"0123456789abcdef",
    b"2",
    b"007",
    b"-0",
    b"0" * 25 + b"7",
    b"",
    b"1,5",
]


@st.composite
def mutated_tsv(draw: st.DrawFn) -> bytes:
    """A generated file in which some lines were damaged in the ways of F1 and F2."""
    rng = random.Random(draw(st.integers(0, 2**20)))
    lines = [_line(rng) for _ in range(draw(st.integers(1, 12)))]
    for _ in range(draw(st.integers(0, 4))):
        index = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["field", "short", "long", "blank", "cr", "crlf", "byte", "cut"]))
        line = lines[index]
        if kind == "field":
            fields = line.split(b"\t")
            fields[draw(st.integers(0, len(fields) - 1))] = draw(st.sampled_from(BAD_FIELDS))
            lines[index] = b"\t".join(fields)
        elif kind == "short":
            lines[index] = line.rpartition(b"\t")[0]
        elif kind == "long":
            lines[index] = line + b"\t" + draw(st.sampled_from([b"", b"1"]))
        elif kind == "blank":
            lines[index] = b""
        elif kind == "cr":
            place = draw(st.integers(0, len(line)))
            lines[index] = line[:place] + b"\r" + line[place:]
        elif kind == "crlf":
            lines[index] = line + b"\r"
        elif kind == "byte":
            place = draw(st.integers(0, max(len(line) - 1, 0)))
            lines[index] = line[:place] + bytes([draw(st.integers(0, 255))]) + line[place + 1 :]
        else:
            lines[index] = line[: draw(st.integers(0, len(line)))]
    text = b"\n".join(lines)
    return text + b"\n" if draw(st.booleans()) or not text else text


def _line(rng: random.Random) -> bytes:
    ints = [rng.choice([b"", b"0", b"-1", b"17", b"2147483648"]) for _ in range(13)]
    cats = [rng.choice([b"", b"05db9164", b"FFFFFFFF", b"a", b"00c"]) for _ in range(26)]
    return b"\t".join([rng.choice([b"0", b"1"]), *ints, *cats])


@settings(derandomize=True, deadline=None, max_examples=250)
@given(text=mutated_tsv(), small_block=st.sampled_from([1 << 24, 700]), small_lines=st.sampled_from([1, 64]))
def test_f1_every_good_row_is_kept_and_every_bad_line_found(
    criteo: SimpleNamespace,
    tmp_path_factory: pytest.TempPathFactory,
    text: bytes,
    small_block: int,
    small_lines: int,
) -> None:
    path = tmp_path_factory.mktemp("f1") / "train.txt"
    path.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "BLOCK_BYTES", small_block)
        patch.setattr(reader, "_SMALL_LINES", small_lines)
        rows, bad, blocks = read(path)
    good, bad_lines = criteo.oracle_file(text)
    assert rows == good
    assert [row.line for row in bad] == bad_lines
    assert blocks[-1].end_byte == len(text)
    for row in bad:
        line = text[row.byte_offset :].split(b"\n")[0]
        assert line.removesuffix(b"\r") == row.content
        assert criteo.oracle_row(line) is None


@pytest.mark.parametrize("fast", [True, False])
def test_well_formed_rows_take_the_fast_path_with_the_same_result(
    criteo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    text = criteo.make_tsv(3000)
    (tmp_path / "t").write_bytes(text)
    line_parser = reader.parse_lines
    slow_calls: list[int] = []

    def counted(*args: Any) -> Any:
        slow_calls.append(1)
        return line_parser(*args)

    monkeypatch.setattr(reader, "parse_lines", counted)
    if not fast:
        monkeypatch.setattr(reader, "_parse_fast", lambda text: None)
    rows, bad, _ = read(tmp_path / "t")
    assert rows == criteo.oracle_file(text)[0]
    assert not bad
    assert bool(slow_calls) is not fast


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_one_bad_line_sends_only_its_neighbourhood_to_the_line_parser(
    criteo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newline: bytes
) -> None:
    lines = criteo.make_tsv(4000).splitlines()
    lines[1234] = b"broken"
    (tmp_path / "t").write_bytes(newline.join(lines))
    parsed: list[int] = []
    line_parser = reader.parse_lines

    def counted(text: bytes, *args: Any) -> Any:
        parsed.append(text.count(b"\n"))
        return line_parser(text, *args)

    monkeypatch.setattr(reader, "parse_lines", counted)
    rows, bad, _ = read(tmp_path / "t")
    assert len(rows) == 3999
    assert [(row.line, row.content) for row in bad] == [(1235, b"broken")]
    assert sum(parsed) <= 64


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: [*f, b""], "41 fields instead of 40"),
        (lambda f: f[1:], "39 fields instead of 40 (Criteo's test.txt has no label)"),
        (lambda f: [b"2", *f[1:]], "field 1 (label): '2' is neither 0 nor 1"),
        (lambda f: [f[0], b"1.5", *f[2:]], "field 2 (int_0): '1.5' is not an integer"),
        (
            lambda f: [*f[:13], b"9223372036854775808", *f[14:]],
            "field 14 (int_12): '9223372036854775808' does not fit",
        ),
        (lambda f: [*f[:14], b"xyz", *f[15:]], "field 15 (cat_0): 'xyz' is not 1 to 8 hexadecimal digits"),
        (
            lambda f: [*f[:39], b"123456789"],
            "field 40 (cat_25): '123456789' is not 1 to 8 hexadecimal digits",
        ),
        (lambda f: [*f[:39], b'"12"'], "field 40 (cat_25): '\"12\"' is not 1 to 8"),
        (lambda f: [b"\xef\xbb\xbf" + f[0], *f[1:]], "byte-order mark"),
        (lambda f: [f[0], b"1\x00", *f[2:]], "NUL"),
        (lambda f: [f[0], b"1\r", *f[2:]], "carriage return"),
        (lambda f: [b""], "blank line"),
    ],
)
def test_reason_names_field_and_value(
    criteo: SimpleNamespace, tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], reason: str
) -> None:
    lines = criteo.make_tsv(5).splitlines()
    lines[2] = b"\t".join(change(lines[2].split(b"\t")))
    (tmp_path / "day_test").write_bytes(b"\n".join(lines) + b"\n")
    rows, bad, _ = read(tmp_path / "day_test")
    assert len(rows) == 4
    assert reason in bad[0].reason
    message = str(bad[0].to_error())
    assert message.startswith(f"{tmp_path / 'day_test'}, line 3 (byte {len(lines[0]) + len(lines[1]) + 2}): ")
    assert "--bad_rows skip" in message


def test_f2_integers_to_the_ends_of_int64(tmp_path: Path) -> None:
    values = [-(2**63), 2**63 - 1, 2**31, -3, 0, -0, 2**53 + 1, None, 7, -1, 10, 2**32, 1]
    fields = [b"" if value is None else b"%d" % value for value in values]
    (tmp_path / "t").write_bytes(b"\t".join([b"1", *fields, *[b"ffffffff"] * 26]))
    rows, bad, _ = read(tmp_path / "t")
    assert rows == [[1, *values, *[2**32 - 1] * 26]]
    assert not bad


@pytest.mark.parametrize("cut_members", [1, 3])
def test_gzip_gives_the_rows_of_the_plain_file(
    criteo: SimpleNamespace, tmp_path: Path, cut_members: int
) -> None:
    text = criteo.make_tsv(200)
    size = len(text) // cut_members + 1
    packed = b"".join(gzip.compress(text[start : start + size]) for start in range(0, len(text), size))
    (tmp_path / "plain").write_bytes(text)
    (tmp_path / "named.txt").write_bytes(packed)
    assert read(tmp_path / "named.txt")[0] == read(tmp_path / "plain")[0] == criteo.oracle_file(text)[0]


@pytest.mark.parametrize("packed", [False, True])
def test_reading_goes_on_after_any_block(
    criteo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 2000)
    text = criteo.make_tsv(60) + b"bad\n" + criteo.make_tsv(3, seed=1).removesuffix(b"\n")
    path = tmp_path / "t"
    path.write_bytes(gzip.compress(text) if packed else text)
    rows, bad, blocks = read(path)
    assert len(blocks) > 3
    assert [row.line for row in bad] == [61]
    done = 0
    for block in blocks:
        done += block.table.num_rows
        rest, rest_bad, _ = read(path, start_line=block.end_line, start_byte=block.end_byte)
        assert rest == rows[done:]
        assert rest_bad == [row for row in bad if row.line > block.end_line]


def _tar(text: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("train.txt")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


def _zip(text: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("train.txt", text)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("pack", "reason"),
    [
        (lambda text: b"", "the file is empty"),
        (lambda text: gzip.compress(b""), "the file is empty"),
        (lambda text: gzip.compress(text)[:-9], "damaged or cut gzip"),
        (lambda text: gzip.compress(text)[:400], "damaged or cut gzip"),
        (lambda text: gzip.compress(text)[:300] + b"\x55" * 200, "damaged or cut gzip"),
        (_tar, "tar archive"),
        (_zip, "zip archive"),
    ],
)
def test_files_of_another_kind_are_refused_by_name(
    criteo: SimpleNamespace, tmp_path: Path, pack: Callable[[bytes], bytes], reason: str
) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(pack(criteo.make_tsv(20)))
    with pytest.raises(DataError, match=reason) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_directory_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "absent")
    with pytest.raises(DataError, match="directory"):
        read(tmp_path)


def test_a_file_without_line_endings_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1000)
    (tmp_path / "t").write_bytes(b"0\t1\n" + b"a" * 5000)
    with pytest.raises(DataError, match=r"line 2 .*no line ending within 1996 bytes"):
        read(tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "rows", "clicks"),
    [("criteo_kaggle/train_sample.tsv.gz", 117_335, 30_058), ("criteo_1tb/day_0_sample.gz", 10_000, 265)],
)
def test_real_rows_all_pass(shared_data: Callable[[str], Path], name: str, rows: int, clicks: int) -> None:
    blocks = list(reader.read_blocks(shared_data(name)))
    table = pa.concat_tables([block.table for block in blocks])
    assert (table.num_rows, sum(table.column(0).to_pylist())) == (rows, clicks)
    assert not any(block.bad_rows for block in blocks)


def test_real_rows_equal_the_oracle(shared_data: Callable[[str], Path], criteo: SimpleNamespace) -> None:
    path = shared_data("criteo_1tb/day_0_sample.gz")
    rows, _, _ = read(path)
    with gzip.open(path) as handle:
        assert rows == criteo.oracle_file(handle.read())[0]
