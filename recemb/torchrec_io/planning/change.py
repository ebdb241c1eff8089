"""A change that makes a plan fit: to the compression, the storage, or the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tqdm import tqdm

from recemb.backends.memory import memory_report
from recemb.planner.budget import BudgetedTables, compress
from recemb.planner.search import fits as planner_fits
from recemb.planner.search import least_storage
from recemb.torchrec_io.planning.planned import Layouts, Ranks, Request
from recemb.units import size

# Steps of a compression rate and of a rank's storage: 1 %, and a MB; up to a PB.
RATE_STEP = 1.01
_MB, _MOST_MB = 10**6, 10**9
_MOST_RATE, _MOST_STEPS = 10**6, 2**14
# More than these, or 8 times the hosts there are, are not looked at.
_MOST_HOSTS = 32
# Seconds without a word.
_SILENT = 3.0


@dataclass(frozen=True)
class Change:
    """A setting that fits, and the next smaller one, which does not.

    Attributes:
        flag: as ``recemb plan`` takes it.
        fits, smaller: values of the flag; it is known of ``smaller`` that the planner finds no plan.
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


def fitting_changes(
    request: Request, method: str, rate: float, method_threshold: int, progress: bool = True
) -> list[Change]:
    """Changes that make a model fit that does not: at most one for each setting; a step less does not fit.

    No less HBM (DDR on the CPU) fits. Less compression or fewer ranks might, further below: more of them need
    not fit better, and not all are tried. What takes more than a few seconds shows its progress on a
    terminal's stderr.

    Args:
        request: whose plan does not fit.
        method, rate, method_threshold: by which its tables were compressed.
        progress: ``False`` shows none.
    """
    with tqdm(
        desc="change that fits",
        unit=" tries",
        delay=_SILENT,
        miniters=1,
        leave=False,
        disable=None if progress else True,
    ) as bar:
        looking = _Looking(request, bar)
        found = (
            looking.rate(method, rate, method_threshold),
            looking.storage(),
            looking.world(),
        )
    return [change for change in found if change is not None]


class _Looking:
    """For changes to one request, with a bar of how many plans were tried."""

    def __init__(self, request: Request, bar: Any) -> None:
        self._request, self._bar = request, bar

    def rate(self, method: str, rate: float, method_threshold: int) -> Change | None:
        """A compression that fits where 1 % less does not; ``None`` when none does.

        Compressed tables have the cache of the first one that has one, if any.
        """
        if method == "dense":
            return None
        hot = next((table.compression.cache for table in self._request.tables if table.cache_rows), None)
        room = _room(self._request.ranks)

        def at(step: int) -> float:
            return float(f"{rate * RATE_STEP**step:.6g}")

        @cache
        def budget(step: int) -> BudgetedTables:
            self._tell("--compress_rate", f"{at(step):g}")
            return compress(self._request.tables, method, at(step), method_threshold, hot)

        def hopeless(step: int) -> bool:
            return at(step) <= _MOST_RATE and budget(step).memory.total.num_bytes > room

        def fits(step: int, thorough: bool) -> bool:
            if at(step) > _MOST_RATE:
                return False
            layouts = Layouts(replace(self._request, tables=budget(step).tables))
            return planner_fits(layouts.units, layouts.cluster(), thorough)

        found = _least(fits, hopeless, 0, _MOST_STEPS)
        return None if found is None else Change("--compress_rate", at(found), at(found - 1))

    def storage(self) -> Change | None:
        """The least HBM of a rank that fits (DDR on the CPU), in steps of a MB; ``None`` when none does."""
        kind = "hbm" if self._request.costs.device == "cuda" else "ddr"
        now: int = getattr(self._request.ranks, kind)
        layouts = Layouts(self._request)
        self._tell(f"--{kind}", "")
        least = least_storage(layouts.units, layouts.cluster())
        if least is None:
            return None

        def roomy(step: int) -> bool:
            return bool((least.used <= layouts.cluster(**{kind: now + step * _MB}).capacity).all())

        found = _least_above(0, _some_above(0, _MOST_MB, 1, roomy), lambda step: not roomy(step))
        return None if found is None else Change(f"--{kind}", now + found * _MB, now + (found - 1) * _MB)

    def world(self) -> Change | None:
        """Ranks that fit where a host less does not, each with the same batch; ``None`` when none do."""
        request, local = self._request, self._request.ranks.local_world_size
        hosts = request.ranks.world_size // local
        stored = memory_report(request.tables).total.num_bytes

        def with_hosts(step: int) -> Ranks:
            return replace(request.ranks, world_size=step * local)

        def fits(step: int, thorough: bool) -> bool:
            self._tell("--world_size", f"{step * local}")
            layouts = Layouts(replace(request, ranks=with_hosts(step)))
            return planner_fits(layouts.units, layouts.cluster(), thorough)

        most = max(_MOST_HOSTS, 8 * hosts)
        found = _least(fits, lambda step: stored > _room(with_hosts(step)), hosts, most)
        beside = f" --local_world_size {local} --batch_size {request.batch_size}"
        return None if found is None else Change("--world_size", found * local, (found - 1) * local, beside)

    def _tell(self, flag: str, value: str) -> None:
        self._bar.set_postfix_str(f"{flag} {value}", refresh=False)
        self._bar.update()


def _room(ranks: Ranks) -> float:
    """Bytes of every kind on all ranks together, of which look-ups need some besides."""
    return ranks.world_size * (ranks.hbm + ranks.ddr) * (1 - ranks.reserved)


def _least(
    fits: Callable[[int, bool], bool], hopeless: Callable[[int], bool], low: int, most: int
) -> int | None:
    """The least step above ``low``, which does not fit, that does; ``None`` when ``most`` does not.

    Args:
        fits: of a step, and whether to look thoroughly.
        hopeless: true only of steps of which none fits, and of all below them.
    """
    above = _least_above(low, _some_above(low, most, 1, lambda step: not hopeless(step)), hopeless)
    if above is None:
        return None
    # From there on in strides that suit the distance, with a quick look; then thoroughly in between.
    stride, low = max(1, (above - low) // 8), above - 1
    some = _some_above(low, most, stride, lambda step: fits(step, False))
    if some is None:
        some = most if fits(most, True) else None
    return _least_above(low, some, lambda step: not fits(step, True))


def _some_above(low: int, most: int, stride: int, holds: Callable[[int], bool]) -> int | None:
    """A step above ``low`` for which it holds, by strides that double; ``None`` when not even at ``most``."""
    while not holds(min(low + stride, most)):
        if low + stride >= most:
            return None
        low, stride = low + stride, 2 * stride
    return min(low + stride, most)


def _least_above(low: int, high: int | None, fails: Callable[[int], bool]) -> int | None:
    """The least step above ``low`` and up to ``high``, which does not fail, that does not, by halving."""
    if high is None:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fails(middle) else (low, middle)
    return high
