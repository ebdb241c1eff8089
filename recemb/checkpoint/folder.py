"""The directory that holds a run's checkpoints, and the renames that make a save all or nothing.

::

    ROOT/step-300/                  a complete checkpoint: manifest.json, rank-00000.safetensors, ...
    ROOT/step-400.tmp-<uuid>/       being written or removed, or left by a crash; the next save removes it
    ROOT/step-300.old-<uuid>/       complete; a second save of its step was about to take its place
    ROOT/step-900.superseded-<uuid> complete, of training that was given up: never loaded, never removed
    ROOT/LATEST                     the name of the last one saved, for people and scripts
    ROOT/.lock                      held by the process that saves here, which is named in it
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from uuid import uuid4

from recemb.errors import CheckpointError, DiskFullError
from recemb.files import is_full, sync_directory, write_text

LATEST_FILE: Final = "LATEST"
LOCK_FILE: Final = ".lock"
_NAME: Final = re.compile(r"step-(0|[1-9][0-9]{0,18})(?:\.(tmp|old)-[0-9a-f]{32})?")
_UNSUPPORTED: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

log = logging.getLogger(__name__)
# Held until the process ends: two runs that save in turns harm each other as much as two that save at once.
_locks: dict[Path, tuple[int, int]] = {}


def name_of(step: int) -> str:
    """The name of a complete checkpoint."""
    return f"step-{step}"


def temporary_name(step: int) -> str:
    """A new name for one that is not complete."""
    return f"step-{step}.tmp-{uuid4().hex}"


def complete(root: Path) -> list[tuple[int, str]]:
    """Step and name of everything that is named as complete, the newest first by step.

    Clocks and modification times mean nothing here. Of one step the replaced comes after its replacement.
    """
    found = [(step, kind, name) for step, kind, name in _listed(root) if kind != "tmp"]
    return [(step, name) for step, kind, name in sorted(found, key=lambda item: (-item[0], item[1], item[2]))]


def unfinished(root: Path) -> list[str]:
    """The names of what a save that did not finish has left."""
    return sorted(name for _, kind, name in _listed(root) if kind == "tmp")


def _listed(root: Path) -> Iterator[tuple[int, str, str]]:
    try:
        entries = list(os.scandir(root))
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read: {error.strerror}") from error
    for entry in entries:
        matched = _NAME.fullmatch(entry.name)
        if matched is None:
            continue
        if not entry.is_dir(follow_symlinks=False):
            log.warning("%s: skipped: is no directory itself", entry.path)
            continue
        yield int(matched[1]), matched[2] or "", entry.name


@contextmanager
def disk_errors(root: Path, needed: int) -> Iterator[None]:
    """Turn a failure of the file system into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise disk_full(root, needed) from error
        where = error.filename or root
        raise CheckpointError(
            f"{where}: a checkpoint cannot be written here: {error.strerror or error}; the ones before it "
            "are intact. Choose a directory that every rank can write to"
        ) from error


def free_bytes(root: Path) -> int:
    """Bytes that this user can still write."""
    while not root.exists():
        root = root.parent
    status = os.statvfs(root)
    return status.f_bavail * status.f_frsize


def disk_full(root: Path, needed: int) -> DiskFullError:
    """The error for a checkpoint of ``needed`` bytes that does not fit."""
    free = free_bytes(root)
    return DiskFullError(
        f"{root}: the checkpoint takes {needed:,} bytes and {free:,} are free; the ones before it are "
        "intact. Free some space, or keep fewer",
        needed,
        free,
    )


def lock(root: Path) -> None:
    """Claim ``root`` for this process until it ends, however it ends; does nothing when it has it already.

    Makes the directory where there is none, durably.

    Raises:
        CheckpointError: another process has claimed it and still runs; names it.
        OSError: it cannot be made or written.
    """
    missing = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_directory(made.parent)
    path = root.resolve() / LOCK_FILE
    held = _locks.get(path)
    if held is not None and held[0] == os.getpid() and _is(path, held[1]):
        return
    if held is not None:
        # A forked child's copy, or the lock of a directory that is gone.
        os.close(held[1])
        del _locks[path]
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        # A record lock: the kernel drops it with the process, and children do not inherit it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno in _UNSUPPORTED:
            log.warning("%s: this file system has no locks; let one run at a time save here", root)
            return
        raise CheckpointError(
            f"{root}: another run saves its checkpoints here ({owner or 'its process is unknown'}); stop it, "
            "or give this one another directory"
        ) from error
    _locks[path] = os.getpid(), descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def clear_unfinished(root: Path) -> None:
    """Remove what crashes have left; only the holder of the lock may."""
    for name in unfinished(root):
        shutil.rmtree(root / name, ignore_errors=True)
    for path in root.glob(f"{LATEST_FILE}.tmp-*"):
        path.unlink(missing_ok=True)


def commit(root: Path, temporary: str, step: int) -> Path:
    """Give the complete directory ``temporary`` its name; a crash leaves it or what was there before.

    Raises:
        OSError, CheckpointError: it is called ``temporary`` again, and what loaded before still does.
    """
    final = root / name_of(step)
    sync_directory(root / temporary)
    if (step, final.name) in complete(root):
        os.rename(final, root / f"{name_of(step)}.old-{uuid4().hex}")
    os.rename(root / temporary, final)
    try:
        sync_directory(root)
        _supersede(root, step)
    except Exception:
        os.rename(final, root / temporary)
        raise
    try:
        # Syncs the directory once more.
        write_text(root / LATEST_FILE, f"{final.name}\n")
    except OSError as error:
        # Nothing is loaded by it.
        log.warning("%s: not written, and may not name %s: %s", root / LATEST_FILE, final.name, error)
    return final


def _supersede(root: Path, step: int) -> None:
    """Rename those newer than ``step``, the newest last: until then it is the one that loads."""
    for other, name in reversed(complete(root)):
        if other > step:
            aside = f"{name_of(other)}.superseded-{uuid4().hex}"
            log.warning("%s: is newer than the step %d saved now; renamed to %s", root / name, step, aside)
            os.rename(root / name, root / aside)


def prune(root: Path, keep: int, usable: Callable[[Path], bool]) -> None:
    """Remove all but the newest ``keep`` that are ``usable``; a failure is only logged."""
    kept: set[int] = set()
    for step, name in complete(root):
        # One of a step that is kept is its predecessor.
        if len(kept) == keep or step in kept:
            _remove(root, name, step)
        elif usable(root / name):
            kept.add(step)


def _remove(root: Path, name: str, step: int) -> None:
    # Renamed first: half of it must not look complete.
    doomed = root / temporary_name(step)
    try:
        os.rename(root / name, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        log.warning("%s: could not be removed: %s", root / name, error.strerror)
