"""F27: killed at any moment of a save, what was saved before loads, and the new one is absent or complete."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recemb.checkpoint import latest_checkpoint, save_checkpoint, shard_file
from tests.checkpoint.ranks import same
from tests.processes import fork, status_of

# Every call through which the file system changes. `shutil.rmtree` and `Path` come down to these.
CHANGES = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "ftruncate")


def _state(step: int, save: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * save + step)
    return {"model": {"w": torch.randn(6, 4, generator=generator), "n": torch.tensor(step)}, "save": save}


def _save(root: Path, step: int, keep: int, save: int = 0) -> None:
    save_checkpoint(root, step, _state(step, save), {"save": save}, keep=keep)


def _loaded(root: Path) -> tuple[int, int]:
    """Step and number of the save that loads, having compared all of it."""
    found = latest_checkpoint(root)
    assert found is not None
    state = _state(0, 0)
    found.load(state)
    assert same(state, _state(found.step, found.extra["save"]))
    return found.step, found.extra["save"]


class Killer:
    """Counts the calls that change files; kills this process before one of them, or half through a write."""

    def __init__(self, at: int, halves: bool) -> None:
        self._calls, self._at, self._halves = 0, at, halves

    def install(self) -> None:
        for name in ("write",) if self._halves else CHANGES:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self._calls += 1
            if self._calls == self._at:
                if self._halves:
                    inner(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **named)

        return call


@pytest.mark.parametrize("halves", [False, True], ids=["before each call", "half through each write"])
@pytest.mark.parametrize(
    ("steps", "keep"),
    [((10, 20), 1), ((10, 20), 2), ((10, 10), 1), ((10, 20, 15), 2), ((20, 15), 1), ((20, 30, 15), 1)],
    ids=["replaces", "next step", "same step", "step given up", "only step given up", "steps given up"],
)
def test_f27_killed_at_every_call_of_a_save(
    tmp_path: Path, steps: tuple[int, ...], keep: int, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two blocks, so that there is a moment between them.
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 64)
    *earlier, last = steps
    outcomes = set()
    for at in range(1, 200):
        root = tmp_path / str(at)

        def work(root: Path = root, at: int = at) -> None:
            for save, step in enumerate(earlier):
                _save(root, step, 2, save)
            Killer(at, halves).install()
            _save(root, last, keep, len(earlier))

        status = status_of(fork(work))
        assert status in (0, -signal.SIGKILL)
        outcomes.add(_loaded(root))
        if status == 0:
            break
        if halves or at % 4 == 0:

            def after(root: Path = root) -> None:
                """The next save finds a directory that it can work with, and leaves no trace of the crash."""
                _save(root, 30, 2)
                assert _loaded(root) == (30, 0)
                assert not list(root.glob("*.tmp-*"))

            assert status_of(fork(after)) == 0
    else:
        pytest.fail("the save never came to an end")
    assert at > (4 if halves else 20), "fewer calls than a save can do with: the hooks see nothing"
    assert _loaded(root) == (last, len(earlier))
    # What loaded before, until the new one does.
    either = set(list(zip(steps, range(len(steps)), strict=True))[-2:])
    assert outcomes <= either
    assert halves or outcomes == either


def test_f27_half_a_removed_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    """Killed while an old checkpoint is removed: it has lost its name before its first file."""
    for step in (10, 20):
        _save(tmp_path, step, 2)

    def work() -> None:
        inner = os.unlink

        def unlink(path: Any, **named: Any) -> None:
            inner(path, **named)
            os.kill(os.getpid(), signal.SIGKILL)

        os.unlink = unlink  # type: ignore[assignment]
        _save(tmp_path, 30, 1)

    os.unlink(tmp_path / ".lock")
    assert status_of(fork(work)) == -signal.SIGKILL
    seen = sorted(path.name.partition("-")[2].partition("-")[0] for path in tmp_path.glob("step-*"))
    assert "30" in seen
    assert any(name.endswith(".tmp") for name in seen)
    assert _loaded(tmp_path) == (30, 0)


def test_f27_power_cut_after_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directories that it made have been synced into those above them."""
    synced: list[Path] = []
    inner = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        inner(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    _save(tmp_path / "run" / "checkpoints", 10, 1)
    assert {tmp_path, tmp_path / "run", tmp_path / "run" / "checkpoints"} <= set(synced)


def test_f27_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are on the disk before the name that counts, and that before what it replaces goes."""
    events: list[tuple[str, str]] = []
    inner_sync, inner_rename, inner_rmtree = os.fsync, os.rename, os.rmdir

    def name_of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition(".tmp-")[0]

    def fsync(descriptor: int) -> None:
        events.append(("sync", name_of(descriptor)))
        inner_sync(descriptor)

    def rename(source: Any, target: Any, **named: Any) -> None:
        events.append(("rename", Path(target).name.partition(".tmp-")[0]))
        inner_rename(source, target, **named)

    def rmdir(path: Any, **named: Any) -> None:
        events.append(("remove", Path(path).name.partition(".tmp-")[0]))
        inner_rmtree(path, **named)

    root = tmp_path / "checkpoints"
    _save(root, 10, 1)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "rmdir", rmdir)
    _save(root, 20, 1)
    assert events == [
        ("sync", "rank-00000.safetensors"),
        ("sync", "step-20"),
        ("sync", "manifest.json"),
        ("sync", "step-20"),
        ("rename", "step-20"),
        ("sync", "checkpoints"),
        ("sync", "LATEST"),
        ("sync", "checkpoints"),
        ("rename", "step-10"),
        ("remove", "step-10"),
    ]
