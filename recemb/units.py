"""Quantities as people read them."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """``12.3 GB``: three figures, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError
