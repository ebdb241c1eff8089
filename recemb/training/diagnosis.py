"""What this machine and installation can do, what is missing, and the command that repairs it."""

from __future__ import annotations

import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from recemb.stack import REPAIR_TRIO, mismatches, versions

Status = Literal["ok", "note", "missing"]

_VECTOR_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
_MODULES = ("torch", "torchrec", "fbgemm_gpu", "pyarrow", "safetensors", "pydantic", "yaml", "numpy", "tqdm")


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``missing``: training cannot work; ``note``: it can, with less."""

    name: str
    status: Status
    value: str
    repair: str = ""


def examine() -> list[Finding]:
    """Every finding, in the order in which they are printed."""
    found = versions()
    checks: list[Callable[[], list[Finding]]] = [
        lambda: [Finding(name, "ok", found[name]) for name in ("recemb", "python")],
        lambda: [_package(name, found) for name in ("torch", "torchrec", "fbgemm")],
        lambda: [_trio(found), _triton(found), _imports(), *_native()],
        lambda: [_cpu(), _threads(), _memory(), _gpu(), _matplotlib()],
    ]
    return [finding for check in checks for finding in check()]


def _package(name: str, found: dict[str, str]) -> Finding:
    if name in found:
        return Finding(name, "ok", found[name])
    return Finding(name, "missing", "not installed", REPAIR_TRIO)


def _trio(found: dict[str, str]) -> Finding:
    wrong = mismatches(found)
    if wrong:
        return Finding("matched trio", "missing", "; ".join(wrong), REPAIR_TRIO)
    return Finding("matched trio", "ok", "torch, torchrec and fbgemm belong together")


def _triton(found: dict[str, str]) -> Finding:
    if "triton" in found:
        return Finding("triton", "ok", found["triton"])
    return Finding("triton", "note", "not installed; only GPU kernels need it", "pip install 'recemb[gpu]'")


def _imports() -> Finding:
    """Import everything a run needs: versions alone do not show a broken shared library."""
    for name in _MODULES:
        try:
            import_module(name)
        # A half-installed C++ extension raises OSError or RuntimeError rather than ImportError.
        except (ImportError, OSError, RuntimeError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Finding("imports", "missing", f"import {name} fails: {first}", REPAIR_TRIO)
    return Finding("imports", "ok", f"{len(_MODULES)} packages load")


def _native() -> list[Finding]:
    """Which implementation each look-up runs on, and what compiling kernels needs."""
    try:
        native, build = import_module("recemb_kernels.native"), import_module("recemb_kernels.build")
    except (ImportError, OSError) as error:
        return [Finding("kernels", "missing", f"recemb_kernels does not load: {error}", "pip install -e .")]
    try:
        failure, compiler = "", Finding("C++ compiler", "ok", build.probe())
    except (build.KernelUnavailableError, OSError) as error:  # The probe has no room to be compiled in.
        failure = str(error).splitlines()[0]
        compiler = Finding("C++ compiler", "note", f"{failure}; all runs on plain torch")
    if not failure:
        _try_step(native)
    status: dict[str, str] = native.status(failure)
    slow = [op for op, text in status.items() if not text.startswith("native")]
    return [
        *(Finding(f"kernel {op}", "note" if op in slow else "ok", text) for op, text in status.items()),
        Finding("kernels", "ok", "look-ups without a kernel above run on plain torch; results are the same"),
        compiler,
        _cache(build.cache_dir()),
    ]


def _try_step(native: Any) -> None:
    """Compile the look-up that trains: headers may be missing that nothing else asks for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said below
        try:
            native.attempt(native.STEP, import_module("recemb_kernels.digit_tree.step").step_module)
        except (ImportError, OSError):
            return  # without torch, which is said above


def _cpu() -> Finding:
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    except OSError:
        pass
    vectors = [flag for flag in _VECTOR_FLAGS if flag in flags]
    return Finding("CPU", "ok", f"{model} ({' '.join(vectors) or 'vector flags unknown'})")


def _threads() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        threads = import_module("torch").get_num_threads()
    except (ImportError, OSError, RuntimeError):
        threads = 0
    value = f"torch uses {threads} of {usable} usable cores"
    if threads > usable:
        return Finding("threads", "note", value, f"OMP_NUM_THREADS={usable}")
    return Finding("threads", "ok", value)


def _memory() -> Finding:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line}
        text = f"{sizes['MemAvailable'] / 1e9:.1f} GB available of {sizes['MemTotal'] / 1e9:.1f} GB"
    except (OSError, KeyError, ValueError, IndexError):
        text = "unknown on this system"
    return Finding("memory", "ok", text)


def _gpu() -> Finding:
    try:
        torch = import_module("torch")
        if torch.cuda.is_available():
            names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
            return Finding("GPU", "ok", ", ".join(names))
        built = (
            "this torch is built for the CPU" if torch.version.cuda is None else "torch sees no CUDA device"
        )
    except (ImportError, OSError, RuntimeError):
        built = "torch does not load"
    return Finding("GPU", "note", f"none ({built}); runs use the CPU")


def _cache(folder: Path) -> Finding:
    asked = os.environ.get("RECEMB_CACHE_DIR")
    if asked and Path(asked) != folder:
        text = f"RECEMB_CACHE_DIR={asked} cannot be written; {folder} is used"
        return Finding("cache", "note", text, "set RECEMB_CACHE_DIR to a writable folder")
    if folder.is_relative_to(tempfile.gettempdir()) and not asked:
        text = f"{folder}: the user's cache is not writable, so kernels may be compiled again at each start"
        return Finding("cache", "note", text, "set RECEMB_CACHE_DIR to a writable folder")
    return Finding("cache", "ok", f"{folder} is writable")


def _matplotlib() -> Finding:
    try:
        import_module("matplotlib")
    except ImportError:
        return Finding("plots", "note", "matplotlib is missing", "pip install 'recemb[plots]'")
    return Finding("plots", "ok", "matplotlib loads")
