"""A kernel cache of a test's own, and something to compile into it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from recemb_kernels import build, native


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty kernel cache, which comes before ``tmp_path / "temporary"``; and nothing known of kernels."""
    folder, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("RECEMB_CACHE_DIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    forget_folders()
    monkeypatch.setattr(build, "_libraries", {})
    monkeypatch.setattr(native, "_unavailable", {})
    monkeypatch.setattr(native, "_said", set())
    yield folder
    forget_folders()


def forget_folders() -> None:
    """They are looked for once a process."""
    build.cache_dir.cache_clear()
    build._temporary_dir.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return ANSWER; }')
    return path
