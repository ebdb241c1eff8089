"""Compiles a C++ kernel for the shapes at hand, once, and loads it with ctypes.

As Triton compiles a kernel for the GPU when its shapes are known, this does for the CPU: ``g++
-march=native`` with ranks and widths as constants takes two to four seconds and is cached on disk. (The
look-up that trains, compiled against torch's headers, takes some sixteen.) The library shares torch's OpenMP
runtime, because torch's ``libgomp.so.1`` is already loaded under that name; clang's would bring a second one.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path

INCLUDE = Path(__file__).parent / "include"
_PROBE = Path(__file__).parent / "probe.cpp"
# NaN and infinity keep their meaning, unlike under -ffast-math, and sums their order: the compiler may not
# change it from one blocking to the next. Sums that may be taken in any order say so (`omp simd reduction`).
FLAGS = (
    "-march=native",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffp-contract=fast",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
# With g++ 12 on a Xeon, what -O3 adds makes the pooling of stored rows faster and no train; to compile it
# takes 1.7 times as long.
FULL, QUICK = ("-O3",), ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-fpeel-loops")
_libraries: dict[str, ctypes.CDLL] = {}
_locks: dict[str, threading.Lock] = {}


class KernelUnavailableError(RuntimeError):
    """No native kernel can be had here; the message says why and what to install.

    Args:
        reason: the same for every kernel that fails alike.
        detail: what was met with this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def load(
    name: str,
    sources: Sequence[Path],
    constants: Mapping[str, int | str],
    level: Sequence[str] = FULL,
    others: Sequence[str] = (),
) -> ctypes.CDLL:
    """Compile ``sources`` with ``-DNAME=value`` for every constant, or take the cached library, and load it.

    Safe in several threads and processes at once. A cached file that is damaged is rebuilt.

    Args:
        name: names the file in the cache.
        sources: C++ files, compiled together with ``recemb_kernels/include`` on the include path.
        constants: preprocessor definitions.
        level: how hard to optimise, ``FULL`` or ``QUICK``.
        others: the compiler's words after ``FLAGS``, such as where to find what.

    Raises:
        KernelUnavailableError: no compiler, or it fails, in which case the message holds its first errors; or
            no folder to keep the library in and load it from.
    """
    flags = (*level, *FLAGS, *others)
    key = _key(sources, constants, flags)
    # A lock per library: a thread waits for its own kernel only, so that several compile at once.
    with _locks.setdefault(key, threading.Lock()):
        if key not in _libraries:
            _libraries[key] = _load_or_build(f"{name}-{key}.so", partial(_compile, sources, constants, flags))
        return _libraries[key]


def probe() -> str:
    """Compile a tiny library as a kernel is, and load it.

    Returns:
        The compiler's words, what it says of itself, and where libraries go if not into the cache.

    Raises:
        KernelUnavailableError: no kernel can be had.
    """
    words = compiler()
    version = _compiler_version(words)
    # Under a fixed name, so that it is compiled each time and kept once.
    library = _compile([_PROBE], {}, (*FULL, *FLAGS))
    kept = Path(_load_or_build("probe.so", lambda: library)._name).parent
    elsewhere = (
        "" if kept == cache_dir() else f"; libraries are kept in {kept}, as {cache_dir()} is of no use"
    )
    return f"{shlex.join(words)}: {version}{elsewhere}"


def compiler() -> tuple[str, ...]:
    """The C++ compiler's words: ``$CXX``, which may be ``ccache g++``, else g++; none when there is neither.

    Raises:
        KernelUnavailableError: ``$CXX`` has a quote without its other half.
    """
    named, found = os.environ.get("CXX", ""), shutil.which("g++")
    try:
        return tuple(shlex.split(named)) or ((found,) if found else ())
    except ValueError as error:
        raise KernelUnavailableError(f"CXX={named} is no command; set it to g++", str(error)) from error


@lru_cache(maxsize=1)
def cache_dir() -> Path:
    """A writable folder: ``$RECEMB_CACHE_DIR``, else the user's cache, else a temporary folder."""
    candidates = [
        os.environ.get("RECEMB_CACHE_DIR"),
        os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "recemb"),
    ]
    for candidate in filter(None, candidates):
        named = os.path.expanduser(candidate)
        if named.startswith("~"):  # nobody knows that user's home: none has this one, in some containers
            continue
        # Of the folder that the process is in now; a name without one would be looked for elsewhere.
        folder = Path(named).absolute()
        if _writable(folder):
            return folder
    return _temporary_dir()


@lru_cache(maxsize=1)
def _temporary_dir() -> Path:
    """Of this user, and where another holds the name, of this process."""
    fallback = Path(tempfile.gettempdir()) / f"recemb-{os.getuid()}"
    if _writable(fallback) and _is_private(fallback):
        return fallback
    return Path(tempfile.mkdtemp(prefix="recemb-"))


def _is_private(folder: Path) -> bool:
    """Whether nobody else can put a library there: a folder of this user, not a link to one; closes it."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    folder.chmod(0o700)
    return True


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _key(sources: Sequence[Path], constants: Mapping[str, int | str], flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    # This file too: it says how libraries are compiled and stored.
    for path in (Path(__file__), *sources, *sorted(INCLUDE.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr(sorted(constants.items())).encode())
    words = compiler()
    digest.update(repr((flags, words, _compiler_version(words), _cpu())).encode())
    return digest.hexdigest()[:24]


@lru_cache(maxsize=8)
def _compiler_version(words: tuple[str, ...]) -> str:
    """What a compiler says of itself.

    Raises:
        KernelUnavailableError: there is none, it does not run, or it is clang.
    """
    if not words:
        raise KernelUnavailableError("no C++ compiler found; install g++, or set CXX")
    version = _run(words, ["--version"]).split("\n")[0]
    if "clang" in version:
        raise KernelUnavailableError(
            f"{shlex.join(words)} is clang, whose OpenMP is not torch's; set CXX to g++"
        )
    return version


def _run(words: Sequence[str], arguments: Sequence[str]) -> str:
    """What the compiler prints.

    Raises:
        KernelUnavailableError: it does not start, or it fails.
    """
    name = shlex.join(words)
    try:
        done = subprocess.run(
            [*words, *arguments], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        reason = f"the C++ compiler {name} does not start; install g++, or set CXX"
        raise KernelUnavailableError(reason, str(error)) from error
    if done.returncode:
        reason = f"the C++ compiler {name} fails with exit status {done.returncode}"
        raise KernelUnavailableError(reason, done.stderr.strip()[:2000])
    return done.stdout


@lru_cache(maxsize=1)
def _cpu() -> str:
    """What -march=native depends on: a cache on a shared home serves machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _load_or_build(file_name: str, compiled: Callable[[], bytes]) -> ctypes.CDLL:
    """From the cache, or from a temporary folder where the cache is of no use.

    A folder that can be written to may be full, mounted noexec, without locks, or hold files of other users.
    """
    once, met = cache(compiled), list[str]()
    for folder in (cache_dir, _temporary_dir):
        try:
            return _from_cache(folder() / file_name, once)
        except OSError as error:
            met.append(str(error))
    reason = (
        "compiled kernels can be kept or loaded nowhere; set RECEMB_CACHE_DIR to one that may hold programs"
    )
    raise KernelUnavailableError(reason, "; ".join(met))


def _from_cache(target: Path, compiled: Callable[[], bytes]) -> ctypes.CDLL:
    with _locked(target.with_suffix(".lock")):
        known = target.exists()
        whole = known and _is_whole(target)
        if known and not whole:
            warnings.warn(f"recemb: rebuilding the damaged kernel cache entry {target}", stacklevel=2)
        if not whole:
            _store(target, compiled())
    return ctypes.CDLL(str(target))


def _compile(sources: Sequence[Path], constants: Mapping[str, int | str], flags: Sequence[str]) -> bytes:
    """The library as the file that a compiler has made of the sources."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel.so"
        defines = [f"-D{key}={value}" for key, value in constants.items()]
        _run(compiler(), [*flags, *defines, f"-I{INCLUDE}", *map(str, sources), "-o", str(output)])
        return output.read_bytes()


def _store(target: Path, library: bytes) -> None:
    """Write a library with its digest behind it, where no loader looks: one file, both or neither."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        written = Path(folder) / target.name
        with written.open("wb") as file:
            file.write(library + hashlib.sha256(library).digest())
            file.flush()
            # Else a crash of the machine may leave the name without the bytes.
            os.fsync(file.fileno())
        # Same folder, so the rename is atomic: another process sees the whole library or none.
        os.replace(written, target)


def _is_whole(target: Path) -> bool:
    """Whether a file is as it was stored. To load one that is cut short kills the process (SIGBUS)."""
    content = target.read_bytes()
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
