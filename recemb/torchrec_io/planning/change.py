"""The smallest change that makes a plan fit: to the compression, the storage, or the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from recemb.planner.budget import BudgetedTables, compress
from recemb.planner.report import size
from recemb.torchrec_io.planning.planned import Planned, Request, plan_tables

# Steps of a compression rate and of a rank's storage: 1 %, and 0.2 % in whole MB.
RATE_STEP = 1.01
_STORAGE_STEPS, _MB = 500, 10**6
_MOST_RATE, _MOST_STEPS = 10**6, 2**14
# More than these, or 8 times the hosts there are, are not looked at.
_MOST_HOSTS = 32


@dataclass(frozen=True)
class Change:
    """A setting that fits, and the next smaller one, which does not.

    Attributes:
        flag: as ``recemb plan`` takes it.
        fits, smaller: values of the flag; ``smaller`` was planned too and does not fit.
        beside: flags that were kept, where their defaults depend on this one.
    """

    flag: str
    fits: float
    smaller: float
    beside: str = ""

    def __str__(self) -> str:
        shown = {"--hbm": size, "--ddr": size}.get(self.flag)
        if shown is not None:
            # Exactly the bytes that were planned.
            return f"{self.flag} {self.fits:.0f} ({shown(self.fits)} a rank)"
        return f"{self.flag} {self.fits:.10g}{self.beside}"


def smallest_rate(request: Request, method: str, rate: float, method_threshold: int) -> Change | None:
    """The least compression that fits, in steps of 1 %; ``None`` when none does.

    Compressed tables have the cache of the first one in ``request``, if any.
    """
    if method == "dense":
        return None
    cache = next((table.compression.cache for table in request.tables if table.cache_rows), None)

    def at(step: int) -> float:
        return float(f"{rate * RATE_STEP**step:.6g}")

    def fits(step: int) -> bool:
        if at(step) > _MOST_RATE:
            return False
        budget: BudgetedTables = compress(request.tables, method, at(step), method_threshold, cache)
        return _fits(replace(request, tables=budget.tables))

    found = _least(fits, 0, _MOST_STEPS)
    return None if found is None else Change("--compress_rate", at(found), at(found - 1))


def smallest_storage(request: Request) -> Change | None:
    """The least HBM of a rank that fits (DDR on the CPU); ``None`` when none does."""
    kind = "hbm" if request.costs.device == "cuda" else "ddr"
    now: int = getattr(request.ranks, kind)
    width = max(_MB, now // _STORAGE_STEPS // _MB * _MB)

    def at(step: int) -> int:
        return now + step * width

    def fits(step: int) -> bool:
        return _fits(replace(request, ranks=replace(request.ranks, **{kind: at(step)})))

    found = _least(fits, 0, _MOST_STEPS)
    return None if found is None else Change(f"--{kind}", at(found), at(found - 1))


def smallest_world(request: Request) -> Change | None:
    """The fewest ranks that fit, whole hosts, each rank with the same batch; ``None`` when none do."""
    local = request.ranks.local_world_size
    hosts = request.ranks.world_size // local

    def fits(step: int) -> bool:
        return _fits(replace(request, ranks=replace(request.ranks, world_size=step * local)))

    found = _least(fits, hosts, max(_MOST_HOSTS, 8 * hosts))
    beside = f" --local_world_size {local} --batch_size {request.batch_size}"
    return None if found is None else Change("--world_size", found * local, (found - 1) * local, beside)


def _fits(request: Request) -> bool:
    found: Planned = plan_tables(request)
    return found.plan is not None


def _least(fits: Callable[[int], bool], low: int, most: int) -> int | None:
    """The least step above ``low``, which does not fit, that does; doubling, then halving."""
    width = 1
    while not fits(min(low + width, most)):
        if low + width >= most:
            return None
        low, width = low + width, 2 * width
    high = min(low + width, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
