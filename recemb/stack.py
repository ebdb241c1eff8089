"""torch, torchrec and fbgemm must come from one release; a wrong trio crashes far from its cause.

The rule (fbgemm_gpu/__init__.py): torch 2.(m + 5) goes with fbgemm 1.m and torchrec 1.m.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from recemb import __version__
from recemb.errors import ConfigError

SUPPORTED = {"torch": "2.13", "torchrec": "1.8", "fbgemm": "1.8"}
REPAIR_CPU = "pip install --no-deps torch==2.13.0 torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0"
REPAIR_GPU = "pip install torch==2.13.0 torchrec==1.8.0 fbgemm-gpu==1.8.0"
REPAIR_TRIO = f"CPU: {REPAIR_CPU}; GPU: {REPAIR_GPU}"
# torchrec pulls in the CUDA wheel, which overwrites the files of the CPU wheel in the same folder.
REPAIR_OVERLAY = "pip install --force-reinstall --no-deps fbgemm-gpu-cpu==1.8.0"

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


def mismatches(found: Mapping[str, str]) -> list[str]:
    """What is wrong with a trio of versions, one sentence each; empty when it matches."""
    wrong = []
    for name, minor in SUPPORTED.items():
        if name not in found:
            wrong.append(f"{name} is not installed")
        elif found[name].split("+")[0].split(".")[:2] != minor.split("."):
            wrong.append(f"{name} {found[name]} is installed, {minor}.* is needed")
    return wrong


def check_stack() -> None:
    """Raise :class:`ConfigError` with the command that repairs a wrong or broken trio."""
    wrong = mismatches(versions())
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}. On a CPU box: {REPAIR_CPU}. On a GPU box: {REPAIR_GPU}")
    try:
        import_module("torchrec")
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"torchrec does not import ({error}). On a CPU box this repairs it: {REPAIR_OVERLAY}"
        ) from error
