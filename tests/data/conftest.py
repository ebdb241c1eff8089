"""Generated Criteo TSV, an oracle parser that shares no code with recemb, small prepared logs, and kills."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recemb.data import criteo as reader
from recemb.data import prepare as module
from recemb.data import raw_log
from recemb.data.prepare_settings import PrepareSettings

NUM_INT, NUM_CAT = 13, 26


def oracle_row(line: bytes) -> list[int | None] | None:
    """The 40 values of a line, or None: Criteo's format as its readme has it, one character at a time."""
    if line.endswith(b"\r"):
        line = line[:-1]
    fields = line.split(b"\t")
    if len(fields) != 40 or fields[0] not in (b"0", b"1"):
        return None
    row: list[int | None] = [fields[0] == b"1"]
    for field in fields[1:14]:
        digits = field[1:] if field[:1] == b"-" else field
        if field == b"":
            row.append(None)
            continue
        if digits == b"" or any(byte not in b"0123456789" for byte in digits):
            return None
        value = 0
        for byte in digits:
            value = value * 10 + byte - 48
        value = -value if field[:1] == b"-" else value
        if value < -(2**63) or value > 2**63 - 1:
            return None
        row.append(value)
    for field in fields[14:]:
        if field == b"":
            row.append(None)
            continue
        if len(field) > 8 or any(byte not in b"0123456789abcdefABCDEF" for byte in field):
            return None
        value = 0
        for byte in field.lower():
            value = value * 16 + (byte - 48 if byte < 58 else byte - 87)
        row.append(value)
    return row


def oracle_file(text: bytes) -> tuple[list[list[int | None]], list[int]]:
    """Good rows, and the numbers (from 1) of the bad lines."""
    lines = text.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    good, bad = [], []
    for number, line in enumerate(lines, start=1):
        row = oracle_row(line)
        if row is None:
            bad.append(number)
        else:
            good.append(row)
    return good, bad


def make_line(rng: random.Random, vocabulary: int = 50) -> bytes:
    """One well-formed row with skewed tokens, some short, some missing, some upper case."""
    fields = [str(int(rng.random() < 0.3))]
    for _ in range(NUM_INT):
        kind = rng.random()
        if kind < 0.2:
            fields.append("")
        elif kind < 0.95:
            fields.append(str(int(rng.paretovariate(0.7)) - 3))
        else:
            fields.append(str(rng.choice([-(2**63), 2**63 - 1, 2**31, -(2**31), 2**53 + 1])))
    for feature in range(NUM_CAT):
        kind = rng.random()
        token = int(vocabulary * rng.random() ** 3) * 2654435761 + feature
        if kind < 0.1:
            fields.append("")
        elif kind < 0.2:
            fields.append(f"{token % 4096:x}")
        else:
            fields.append(f"{token % 2**32:08x}" if kind < 0.9 else f"{token % 2**32:08X}")
    return "\t".join(fields).encode()


def make_tsv(rows: int, seed: int = 0, vocabulary: int = 50) -> bytes:
    """``rows`` well-formed rows."""
    rng = random.Random(seed)
    return b"".join(make_line(rng, vocabulary) + b"\n" for _ in range(rows))


def tree(root: Path) -> dict[str, bytes]:
    """Every file below ``root`` by its relative name."""
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def epoch(log: Any, split: str, batch_size: int, **options: Any) -> np.ndarray[Any, Any]:
    """All rows of an epoch as int64 [n, 40]: label, bits of the dense values, ids."""
    rows = []
    for batch in log.batches(split, batch_size, **options):
        assert batch.dense.dtype == np.float32
        assert batch.labels.dtype == np.float32
        assert batch.ids.dtype == np.int64
        assert batch.ids.flags.c_contiguous
        assert batch.dense.shape == (batch.labels.size, NUM_INT)
        assert batch.ids.shape == (NUM_CAT, batch.labels.size)
        bits = batch.dense.view(np.int32).astype(np.int64)
        rows.append(np.column_stack([batch.labels.astype(np.int64), bits, batch.ids.T]))
    return np.concatenate(rows) if rows else np.empty((0, 40), np.int64)


def settings_for(tmp_path: Path, *texts: bytes, **options: Any) -> PrepareSettings:
    paths = []
    for index, text in enumerate(texts):
        path = tmp_path / f"input_{index}"
        if not path.exists():
            path.write_bytes(text)
        paths.append(path)
    return PrepareSettings(inputs=tuple(paths), **{"output": tmp_path / "out", **options})


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def raise_killed(*args: object) -> Iterator[None]:
    raise Killed


@pytest.fixture(scope="session")
def criteo() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        oracle_row=oracle_row,
        oracle_file=oracle_file,
        make_line=make_line,
        make_tsv=make_tsv,
        tree=tree,
        epoch=epoch,
    )


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several raw parts, several output parts and several row groups from a few hundred rows."""
    monkeypatch.setattr(reader, "BLOCK_BYTES", 8000)
    monkeypatch.setattr(raw_log, "PART_ROWS", 100)
    monkeypatch.setattr(module, "PART_ROWS", 160)
    monkeypatch.setattr(module, "ROW_GROUP_ROWS", 50)
    # 170 of them a run are most of a small run's time; that they are made is tested on its own
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
