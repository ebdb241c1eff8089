"""F28, F33: full, read-only and shared directories; which checkpoints stay, and which is the newest."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recemb.checkpoint import folder, latest_checkpoint, save_checkpoint
from recemb.errors import CheckpointError, DiskFullError
from tests.checkpoint.ranks import on_ranks
from tests.processes import fork, status_of


def _save(root: Path, step: int, rows: int = 10, keep: int = 2) -> Path:
    return save_checkpoint(root, step, {"w": torch.full((rows, 100), float(step))}, {}, keep=keep)


def _loaded(root: Path, rows: int = 10) -> int | None:
    found = latest_checkpoint(root)
    if found is None:
        return None
    state = {"w": torch.zeros(rows, 100)}
    found.load(state)
    assert bool((state["w"] == found.step).all())
    return found.step


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("call", ["write", "fsync", "mkdir", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("before", [(1,), (3, 4)], ids=["next step", "step given up"])
def test_f28_a_disk_that_is_full_at_any_call(
    tmp_path: Path, before: tuple[int, ...], call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: Callable[..., Any] = getattr(os, call)
    failures: list[DiskFullError] = []
    for at in range(1, 100):
        root, calls, failed = tmp_path / str(at), 0, False
        for step in before:
            _save(root, step)

        def full(*args: Any, at: int = at, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(number, os.strerror(number))
            return inner(*args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                _save(root, 2)
            except DiskFullError as error:
                failed = True
                failures.append(error)
        # An error says that there is no step 2.
        assert _loaded(root) == (before[-1] if failed else 2)
        assert failed != (root / "step-2").exists()
        assert not list(root.glob("*.tmp-*"))
        if calls < at:
            break
    assert not failed
    assert failures
    for error in failures:
        assert error.needed > 10 * 100 * 4
        assert error.free > 0
        assert f"{error.needed:,} bytes and {error.free:,} are free" in str(error)


def test_f28_no_room_for_the_name_of_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint is there: the save has succeeded, and those before it go."""
    _save(tmp_path, 1, keep=1)

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(folder, "write_text", full)
    assert _save(tmp_path, 2, keep=1) == tmp_path / "step-2"
    assert "LATEST: not written, and may not name step-2" in caplog.text
    assert _names(tmp_path) == ["LATEST", "step-2"]
    assert _loaded(tmp_path) == 2


def test_f28_no_room_for_the_directory_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any, *rest: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(DiskFullError, match="are free"):
        _save(tmp_path / "a" / "b", 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mount.stderr.strip()}")
    yield place
    # The lock of the run, which lasts as long as this process, is open there.
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_f28_a_small_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 1500  # 600 kB: the second does not fit beside the first
    _save(small_disk, 1, rows)
    before = folder.free_bytes(small_disk)
    with pytest.raises(DiskFullError) as estimated:
        _save(small_disk, 2, rows)
    assert estimated.value.needed > rows * 400 > estimated.value.free == before
    # The estimate was wrong, or others write too: the kernel says so in the middle of the file.
    with monkeypatch.context() as patch:
        patch.setattr(folder, "free_bytes", lambda root: 10**12)
        with pytest.raises(DiskFullError):
            _save(small_disk, 2, rows)
    assert folder.free_bytes(small_disk) == before
    assert _names(small_disk) == ["LATEST", "step-1"]
    assert _loaded(small_disk, rows) == 1


def test_f28_no_room_on_one_rank_is_the_same_error_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "free_bytes", lambda root: 17)
    found = []

    def save(rank: int) -> None:
        with pytest.raises(DiskFullError) as caught:
            _save(tmp_path, 1)
        found.append((caught.value.needed, caught.value.free))

    on_ranks(2, save)
    assert found[0] == found[1]
    assert found[0][1] == 17


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_f33_a_directory_that_cannot_be_written(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, *rest: Any, **named: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be written here.*Choose a directory"):
        _save(tmp_path, 1)


def test_f33_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written here"):
        _save(tmp_path / "file", 1)
    with pytest.raises(CheckpointError, match="cannot be read"):
        latest_checkpoint(tmp_path / "file")


def test_f33_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def first() -> None:
        _save(tmp_path, 1)
        ready.touch()
        time.sleep(60)

    pid = fork(first)
    deadline = time.monotonic() + 20
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        with pytest.raises(CheckpointError, match=f"another run saves its checkpoints here .pid {pid} on "):
            _save(tmp_path, 2)
        # Reading needs no lock.
        assert _loaded(tmp_path) == 1
    finally:
        os.kill(pid, signal.SIGKILL)
        assert status_of(pid) == -signal.SIGKILL
    # The file is still there and names the dead process.
    assert f"pid {pid}" in (tmp_path / ".lock").read_text()
    _save(tmp_path, 2)
    assert f"pid {os.getpid()}" in (tmp_path / ".lock").read_text()


def test_f33_a_forked_child_is_another_run(tmp_path: Path) -> None:
    _save(tmp_path, 1)

    def child() -> None:
        with pytest.raises(CheckpointError, match=f"pid {os.getppid()} "):
            _save(tmp_path, 2)

    assert status_of(fork(child)) == 0
    # The child's attempt has not cost the parent its lock.
    _save(tmp_path, 3)
    assert status_of(fork(child)) == 0


def test_f33_a_directory_made_anew_is_locked_anew(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    _save(root, 1)
    root.rename(tmp_path / "moved")
    _save(root, 1)

    def child() -> None:
        with pytest.raises(CheckpointError, match="another run"):
            _save(root, 2)

    assert status_of(fork(child)) == 0


def test_f30_a_linked_lock_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="cannot be written here"):
        _save(tmp_path / "checkpoints", 1)
    assert (tmp_path / "mine").read_text() == "precious"


def test_f33_order_is_by_step_and_not_by_time(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        _save(tmp_path, step, keep=3)
    for age, step in enumerate((100, 10, 9)):
        os.utime(tmp_path / f"step-{step}", (1000 + age, 1000 + age))
    assert _loaded(tmp_path) == 100
    assert (tmp_path / "LATEST").read_text() == "step-100\n"
    _save(tmp_path, 101, keep=2)
    assert _names(tmp_path) == ["LATEST", "step-100", "step-101"]


def test_f33_training_that_goes_on_from_an_older_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step, keep=3)
    with caplog.at_level(logging.WARNING, "recemb"):
        _save(tmp_path, 2, keep=3)
    assert "step-3: is newer than the step 2 saved now" in caplog.text
    assert _loaded(tmp_path) == 2
    names = [name.partition(".superseded-")[0] for name in _names(tmp_path)]
    assert names == ["LATEST", "step-1", "step-2", "step-3"]
    assert not (tmp_path / "step-3").exists()


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        _save(tmp_path, step)
    (tmp_path / "step-2" / "rank-00000.safetensors").write_bytes(b"")
    _save(tmp_path, 3, keep=2)
    assert _names(tmp_path) == ["LATEST", "step-1", "step-2", "step-3"]
    _save(tmp_path, 4, keep=2)
    assert _names(tmp_path) == ["LATEST", "step-3", "step-4"]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    others = ["step-3.tmp-mine", "step-0003", "step-x", "notes.txt", f"step-1.tmp-{'g' * 32}"]
    for name in others:
        (tmp_path / name).mkdir()
    for step in (1, 2):
        _save(tmp_path, step, keep=1)
    assert _names(tmp_path) == sorted([*others, "LATEST", "step-2"])


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step=-1 must be an int >= 0"),
        ({"step": 1.0}, "step=1.0 must be"),
        ({"keep": 0}, "keep=0 must be an int >= 1"),
        ({"extra": {"rng": object()}}, "extra/rng: a checkpoint holds tensors and JSON values, not object"),
        ({"extra": {1: 2}}, "extra: the key 1 is no str"),
        ({"extra": {"big": "x" * 2**24}}, "extra takes 16,777,227 bytes, more than 16,777,216"),
        ({"extra": {"x": [-(10**5000)]}}, "extra/x/0: an int of 16,610 bits"),
        ({"state": {"n": 10**5000}}, "n: an int of 16,610 bits"),
        ({"state": {"big": "x" * 2**26}}, "the manifest would take"),
    ],
)
def test_wrong_arguments_leave_nothing(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"step": 1, "state": {}, "extra": {}} | arguments
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, **given)
    assert _names(tmp_path) == []
