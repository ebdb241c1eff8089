"""Peak memory of a run."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


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
