"""Files that are whole or absent after a crash: written aside, synced, renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


def is_full(error: OSError) -> bool:
    """Whether a write failed because the disk, or what its user may use of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync_file(path: Path) -> None:
    """Wait until the bytes of ``path`` are on the disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in ``path`` are on the disk: a rename is durable only then."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def commit_file(temporary: Path, final: Path) -> None:
    """Make ``temporary`` durable under the name ``final``: after a crash ``final`` is whole or absent."""
    sync_file(temporary)
    os.replace(temporary, final)
    sync_directory(final.parent)


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Replace ``path`` by what ``write`` puts into the file it is given; a failure leaves the old file."""
    aside = path.with_name(f"{path.name}.tmp-{uuid4().hex}")
    try:
        write(aside)
        commit_file(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part."""

    def write(aside: Path) -> None:
        aside.write_text(text, encoding="utf-8")

    write_aside(path, write)
