"""The shipped configurations of all ops: the one list that the command, the tests and the README read."""

from __future__ import annotations

from collections import Counter
from importlib import import_module

from recemb_kernels.aot.configuration import Configuration

# Each offers ``shipped() -> list[Configuration]``, and may offer ``further()``. An author adds a line here.
MODULES: tuple[str, ...] = (
    "recemb_kernels.tt_gather.triton_shipped",
    "recemb_kernels.pooled_gather.triton_variants",
    "recemb_kernels.robe_gather.triton_variants",
    "recemb_kernels.triton_frame.variants",
    "recemb_kernels.triton_frame.plan_variants",
)

# Autotuning tries every variant of a kernel at the first call of each new shape, at about half a second of
# compiling a variant.
MAX_VARIANTS = 2


def shipped(modules: tuple[str, ...] | None = None) -> list[Configuration]:
    """Every shipped configuration, in the order of the modules.

    Args:
        modules: where to look; :data:`MODULES` when ``None``.

    Raises:
        ImportError: a module of the list does not exist or does not import.
        ValueError: two configurations are the same, or a kernel has more than :data:`MAX_VARIANTS` variants
            for one shape and dtype.
    """
    found: list[Configuration] = []
    for name in MODULES if modules is None else modules:
        found.extend(import_module(name).shipped())
    _refuse(found)
    return found


def further() -> list[Configuration]:
    """What keeps the laws but is not shipped: ``recemb kernels --check`` compiles it all, CI a few.

    Raises:
        ImportError: a module of :data:`MODULES` does not exist or does not import.
        ValueError: as :func:`shipped`.
    """
    modules = [import_module(name) for name in MODULES]
    found = [c for module in modules if hasattr(module, "further") for c in module.further()]
    _refuse(found)
    return found


def _refuse(found: list[Configuration]) -> None:
    exact = Counter(
        (
            c.kernel,
            c.dtype,
            c.note,
            c.num_warps,
            c.num_stages,
            *(repr(dict(part)) for part in (c.signature, c.constants)),
        )
        for c in found
    )
    if twice := [key for key, count in exact.items() if count > 1]:
        raise ValueError(f"shipped twice: {', '.join(str(key[:5]) for key in twice)}")
    variants = Counter((c.kernel, c.dtype, c.note) for c in found)
    if many := [f"{key}: {count}" for key, count in variants.items() if count > MAX_VARIANTS]:
        raise ValueError(
            f"more than {MAX_VARIANTS} variants of one kernel, dtype and shape: {'; '.join(many)}"
        )
