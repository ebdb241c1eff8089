"""What a result depends on besides its configuration: versions, threads, peak memory."""

from __future__ import annotations

import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from recemb import __version__

_PACKAGES = {
    "torch": ("torch",),
    "torchrec": ("torchrec",),
    "fbgemm": ("fbgemm-gpu-cpu", "fbgemm-gpu"),
    "triton": ("triton",),
    "numpy": ("numpy",),
    "pyarrow": ("pyarrow",),
    "safetensors": ("safetensors",),
}


def versions() -> dict[str, str]:
    """recemb, python and the packages that results depend on; a missing package is left out."""
    found = {"recemb": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name, distributions in _PACKAGES.items():
        for distribution in distributions:
            try:
                found[name] = version(distribution)
                break
            except PackageNotFoundError:
                continue
    return found


def reset_peak_rss() -> None:
    """Start a new peak, so that the second of two runs in one process does not report the first one's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # Not Linux, or a sandbox without it: the peak is then that of the whole process.
        return


def peak_rss_bytes() -> int:
    """Largest resident size of this process since :func:`reset_peak_rss`, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
