"""torch, torchrec and fbgemm must come from one release; a wrong trio crashes far from its cause.

The rule (fbgemm_gpu/__init__.py): torch 2.(m + 5) goes with fbgemm 1.m and torchrec 1.m.
"""

from __future__ import annotations

from importlib import import_module, metadata

from recemb.errors import ConfigError

SUPPORTED = {"torch": "2.13", "torchrec": "1.8", "fbgemm": "1.8"}
REPAIR_CPU = "pip install --no-deps torch==2.13.0 torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0"
REPAIR_GPU = "pip install torch==2.13.0 torchrec==1.8.0 fbgemm-gpu==1.8.0"
# torchrec pulls in the CUDA wheel, which overwrites the files of the CPU wheel in the same folder.
REPAIR_OVERLAY = "pip install --force-reinstall --no-deps fbgemm-gpu-cpu==1.8.0"


def installed_versions() -> dict[str, str | None]:
    """Versions of torch, torchrec and fbgemm (whichever wheel), ``None`` where missing."""
    found: dict[str, str | None] = {"torch": None, "torchrec": None, "fbgemm": None}
    for name, wheels in (
        ("torch", ("torch",)),
        ("torchrec", ("torchrec",)),
        ("fbgemm", ("fbgemm-gpu-cpu", "fbgemm-gpu")),
    ):
        for wheel in wheels:
            try:
                found[name] = metadata.version(wheel)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def mismatches(versions: dict[str, str | None]) -> list[str]:
    """What is wrong with a trio of versions, one sentence each; empty when it matches."""
    wrong = []
    for name, minor in SUPPORTED.items():
        version = versions[name]
        if version is None:
            wrong.append(f"{name} is not installed")
        elif version.split("+")[0].split(".")[:2] != minor.split("."):
            wrong.append(f"{name} {version} is installed, {minor}.* is needed")
    return wrong


def check_stack() -> None:
    """Raise :class:`ConfigError` with the command that repairs a wrong or broken trio."""
    wrong = mismatches(installed_versions())
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}. On a CPU box: {REPAIR_CPU}. On a GPU box: {REPAIR_GPU}")
    try:
        import_module("torchrec")
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"torchrec does not import ({error}). On a CPU box this repairs it: {REPAIR_OVERLAY}"
        ) from error
