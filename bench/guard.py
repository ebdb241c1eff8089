"""No speed-up is printed while the tests of the operators are red."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.provenance import ROOT, compiler_version
from recemb.errors import ConfigError
from recemb.stack import versions
from recemb_kernels.build import _cpu, cache_dir

TESTS = ("tests/kernels", "tests/optim")
_SOURCES = (
    *("kernels", "recemb/backends", "recemb/id_maps", "recemb/optim", "recemb/cache", "recemb/torchrec_io"),
    *("recemb/bags.py", "recemb/engine.py", "recemb/spec.py"),
)
_SUFFIXES = {".py", ".cpp", ".h"}


def require_green(tests: Sequence[str] = TESTS, stamps: Path | None = None) -> str:
    """Run the tests in a child process, unless they have passed before on the same sources and system.

    Args:
        tests: files or folders, seen from the root of the checkout.
        stamps: the folder that remembers what has passed; the kernels' own cache when ``None``.

    Returns:
        The hash of the sources and tests, and which tests these are when not the default ones.

    Raises:
        ConfigError: the tests fail, or are not there.
    """
    check_imports()
    missing = [name for name in tests if not (ROOT / name).exists()]
    if missing:
        raise ConfigError(f"--tests {missing[0]}: no such file or folder under {ROOT}")
    sources = source_hash(tests)
    named = sources if tuple(tests) == TESTS else f"{sources} {' '.join(tests)}"
    stamp = (stamps or cache_dir()) / f"bench-green-{sources}-{system_hash()}"
    if stamp.exists():
        return named
    print(
        f"bench: testing the operators first ({' '.join(tests)}), once for these sources and this system",
        file=sys.stderr,
    )
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        reason = lines[0] if lines else (done.stdout + done.stderr).strip().splitlines()[-1]
        raise ConfigError(
            f"no speed is reported while the operators' tests are red: {reason}; "
            f"see python -m pytest {' '.join(tests)} -x"
        )
    stamp.touch()
    return named


def source_hash(tests: Sequence[str]) -> str:
    """Of everything that decides what the operators compute, and of their tests; 12 hex digits."""
    digest = hashlib.sha256()
    for path in _files((*_SOURCES, *tests)):
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def system_hash() -> str:
    """Of what decides the results beside the sources: processor, compiler, libraries; 12 hex digits."""
    parts = (_cpu(), compiler_version(), versions())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _files(names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        path = ROOT / name
        yield from (
            [path]
            if path.is_file()
            else sorted(found for found in path.rglob("*") if found.suffix in _SUFFIXES)
        )


def check_imports() -> None:
    """Raise :class:`ConfigError` unless recemb and its kernels come from this checkout."""
    import recemb
    import recemb_kernels

    for module, expected in ((recemb, ROOT), (recemb_kernels, ROOT / "kernels")):
        found = Path(str(module.__file__)).resolve().parents[1]
        if found != expected:
            raise ConfigError(
                f"{module.__name__} is imported from {found}, the benchmark lies in {ROOT}; "
                f"run it with PYTHONPATH={ROOT}:{ROOT / 'kernels'}"
            )
