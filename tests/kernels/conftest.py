"""A kernel cache of a test's own, and something to compile into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from recemb_kernels import build, native


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty kernel cache, and nothing known of kernels."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RECEMB_CACHE_DIR", str(folder))
    build.cache_dir.cache_clear()
    monkeypatch.setattr(build, "_libraries", {})
    monkeypatch.setattr(native, "_unavailable", {})
    yield folder
    build.cache_dir.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return ANSWER; }')
    return path
