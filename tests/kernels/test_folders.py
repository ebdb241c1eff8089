"""Where compiled kernels are kept, when folders are of no use: read-only, full, noexec, without locks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest

from recemb_kernels import build, native


def noexec(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ctypes.CDLL

    def load(name: str) -> ctypes.CDLL:
        if Path(name).is_relative_to(cache):
            raise OSError(f"{name}: failed to map segment from shared object")
        return plain(name)

    monkeypatch.setattr(ctypes, "CDLL", load)


def full(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.fsync

    def fsync(file: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")).is_relative_to(cache):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(file)

    monkeypatch.setattr(os, "fsync", fsync)


def without_locks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fcntl.flock

    def flock(file: IO[str], operation: int) -> None:
        if Path(file.name).is_relative_to(cache):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        plain(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


def locked_by_another_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.open

    def opened(path: Path, mode: str = "r", *rest: Any, **others: Any) -> IO[Any]:
        if path.suffix == ".lock" and path.is_relative_to(cache):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path, mode, *rest, **others)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("fault", [noexec, full, without_locks, locked_by_another_user])
def test_a_cache_of_no_use_gives_way_to_a_temporary_folder(
    cache: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    fault(cache, monkeypatch)
    compiled: list[object] = []
    plain = build._compile
    monkeypatch.setattr(build, "_compile", lambda *a: (compiled.append(a), plain(*a))[1])
    assert build.load("answer", [source], {"ANSWER": 3}).answer() == 3
    (kept,) = (tmp_path / "temporary").rglob("*.so")
    assert kept.parent.name == f"recemb-{os.getuid()}"
    assert len(compiled) == 1
    # The next process finds it there, unless there may be room by then.
    monkeypatch.setattr(build, "_libraries", {})
    assert build.load("answer", [source], {"ANSWER": 3}).answer() == 3
    assert len(compiled) == (2 if fault is full else 1)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (noexec, "failed to map segment"),
        (full, "No space left"),
        (without_locks, "No locks available"),
        (locked_by_another_user, "Permission denied"),
    ],
)
def test_folders_of_no_use_leave_plain_torch_and_one_warning(
    cache: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Path, pytest.MonkeyPatch], None],
    says: str,
) -> None:
    fault(tmp_path, monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for answer in range(3):
            load = partial(build.load, "answer", [source], {"ANSWER": answer})
            assert native.attempt("tt_gather", load, answer) is None
    (warning,) = caught
    assert "set RECEMB_CACHE_DIR" in str(warning.message)
    assert says in str(warning.message)
    with pytest.raises(build.KernelUnavailableError, match="nowhere"):
        build.probe()


def test_no_folder_at_all(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setenv("RECEMB_CACHE_DIR", "/dev/null/below")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/below")
    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(build.KernelUnavailableError, match="No usable temporary directory"):
        build.load("answer", [source], {"ANSWER": 3})


@pytest.mark.usefixtures("cache")
def test_a_home_that_is_read_only_gives_way_to_a_temporary_folder(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.write_text("no folder, as root may write to those that are read-only")
    monkeypatch.setenv("HOME", str(home))
    for name in ("RECEMB_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert build.cache_dir() == tmp_path / "temporary" / f"recemb-{os.getuid()}"
    assert build.load("answer", [source], {"ANSWER": 8}).answer() == 8


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["HOME", "RECEMB_CACHE_DIR", "XDG_CACHE_HOME"])
def test_a_home_that_nobody_knows_gives_way_to_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As of a user without an entry in passwd, which containers run programs as."""
    monkeypatch.setenv("HOME", "/dev/null")
    for other in ("RECEMB_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(other, raising=False)
    if name == "HOME":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv(name, "~nobody-of-that-name/kernels")
    assert build.cache_dir() == tmp_path / "temporary" / f"recemb-{os.getuid()}"


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("taken", ["file", "link"])
def test_a_temporary_folder_whose_name_is_taken(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    """By another user's file, or by a link, which its owner may turn to another folder."""
    name = tmp_path / "temporary" / f"recemb-{os.getuid()}"
    if taken == "file":
        name.write_text("of another user")
    else:
        (tmp_path / "elsewhere").mkdir()
        name.symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("RECEMB_CACHE_DIR", "/dev/null/below")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/below")
    assert build.cache_dir().parent == tmp_path / "temporary"
    assert build.cache_dir() != name
    assert build.load("answer", [source], {"ANSWER": 8}).answer() == 8


def test_a_temporary_folder_is_closed_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert build._is_private(tmp_path)
    assert tmp_path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("given", [".", "kernels", "~/kernels"])
def test_a_folder_is_that_of_where_the_process_was(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RECEMB_CACHE_DIR", given)
    monkeypatch.chdir(tmp_path)
    build.cache_dir.cache_clear()
    try:
        assert build.cache_dir() == tmp_path / given.removeprefix("~/")
    finally:
        build.cache_dir.cache_clear()
