"""The output directory while it is being written: who may write it, and what is already there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recemb.data.layout import (
    FORMAT_VERSION,
    STATS_FILE,
    WORK_DIR,
    directory_lock,
    disk_errors,
    read_json,
    write_json,
)
from recemb.errors import ConfigError, DataError

_SETTINGS_FILE = "settings.json"


def differing_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """``name: found -> wanted`` for every entry that differs, inputs file by file."""
    differences = []
    for name in sorted(found.keys() | wanted.keys()):
        old, new = found.get(name), wanted.get(name)
        if old == new:
            continue
        if name == "inputs" and isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            pairs = [(o, n) for o, n in zip(old, new, strict=True) if o != n]
            differences += [f"input: {_describe_input(o)} -> {_describe_input(n)}" for o, n in pairs]
        else:
            differences.append(f"--{name}: {old} -> {new}")
    return differences


def _describe_input(entry: Any) -> str:
    if isinstance(entry, dict):
        return f"{entry.get('path')} ({entry.get('bytes')} bytes, changed at {entry.get('mtime_ns')} ns)"
    return str(entry)


def _finished_stats(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The stats of a directory finished with ``settings``; None when nothing is finished there."""
    if not (output / STATS_FILE).exists():
        return None
    stats = read_json(output / STATS_FILE)
    if not isinstance(stats, dict) or not isinstance(stats.get("settings"), dict):
        raise DataError(f"{output / STATS_FILE}: damaged; remove the directory and prepare it again")
    if stats.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{output}: written by another recemb (format {stats.get('format_version')}, this one writes "
            f"{FORMAT_VERSION}); choose another --output"
        )
    _require_same(output, stats["settings"], settings, "finished")
    return stats


def _require_same(output: Path, found: dict[str, Any], settings: dict[str, Any], state: str) -> None:
    differences = differing_settings(found, settings)
    if differences:
        raise ConfigError(
            f"{output}: {state} with other settings:\n  " + "\n  ".join(differences) + "\n"
            "choose another --output, or remove this directory to start over"
        )


@contextmanager
def open_workspace(output: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Claim ``output`` for a run with ``settings`` (JSON values) and hold its lock.

    Yields the stats of an output that is finished with the same settings (there is nothing to do), else None:
    the caller then writes, and what it left in ``output/.prepare`` before an interruption is still there.

    Raises:
        ConfigError: when ``output`` holds something else, was made with other settings (which are named), is
            being written by another process, or cannot be written.
    """
    with disk_errors(output):
        with _opening(output):
            if output.exists() and not output.is_dir():
                raise ConfigError(f"{output}: is a file; choose another --output")
            stats = _finished_stats(output, settings)
            work_dir = output / WORK_DIR
            if stats is None:
                if output.exists() and not work_dir.exists() and any(output.iterdir()):
                    raise ConfigError(f"{output}: holds other files; choose another --output")
                work_dir.mkdir(parents=True, exist_ok=True)
        if stats is not None:
            _remove_work(output)
            yield stats
            return
        with directory_lock(work_dir):
            if (work_dir / _SETTINGS_FILE).exists():
                _require_same(output, read_json(work_dir / _SETTINGS_FILE), settings, "begun")
            else:
                write_json(work_dir / _SETTINGS_FILE, settings)
            yield None


@contextmanager
def _opening(output: Path) -> Iterator[None]:
    """Turn whatever keeps the directory from being there into an error that names the flag."""
    try:
        # Inside, as it knows more about a full or read-only disk.
        with disk_errors(output):
            yield
    except OSError as error:
        raise ConfigError(
            f"--output {output}: cannot write: {error.strerror or error}; give another --output"
        ) from error


def finish(output: Path, stats: dict[str, Any]) -> None:
    """Write ``stats.json``, which makes the directory a finished one, then remove the intermediate files."""
    write_json(output / STATS_FILE, stats)
    _remove_work(output)


def _remove_work(output: Path) -> None:
    # a killed run can leave some of it beside stats.json; the next command removes the rest
    shutil.rmtree(output / WORK_DIR, ignore_errors=True)
