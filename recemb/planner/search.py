"""The sharding plan of least time, and how close to the best it must be.

The slowest rank sets a step's time, as in torchrec's cost model. The fastest of
:class:`recemb.planner.plans.Plans` is compared with the lower bound, so that every plan states how far from
the best it can be. Where a plan is found, one is found with more of the first kind of storage that is used
(HBM; on a CPU, DDR). Of other kinds more may in rare cases miss it, and the plan found with more of any may
be slower than with less: each amount has choices of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recemb.planner.layout import Cluster, Unit, prune
from recemb.planner.placement import Placement
from recemb.planner.plans import CLOSE, Packing, Plans


@dataclass(frozen=True, eq=False)
class Found:
    """A search's outcome.

    Attributes:
        placement: the best plan, or ``None`` when no plan was found that fits.
        bound: no plan is faster than this, ms; infinite when it is certain that none fits.
        options_before, options_after: how many options the search had before and after pruning.
        tried: how many choices were placed.
    """

    placement: Placement | None
    bound: float
    options_before: int
    options_after: int
    tried: int

    @property
    def gap(self) -> float:
        """How far above the bound the plan is, as a fraction: 0 is proven best."""
        if self.placement is None:
            return float("inf")
        return max(0.0, self.placement.cost / self.bound - 1) if self.bound > 0 else 0.0


def search(units: Sequence[Unit], cluster: Cluster, pruning: bool = True) -> Found:
    """The fastest plan found, and how close it must be to the fastest there is.

    Args:
        units: what is placed; each has an option at least.
        cluster: the ranks.
        pruning: leave dominated options out, which loses nothing; for comparison. Options with a shard that
            fits no empty rank are always left out.
    """
    before = sum(len(unit.options) for unit in units)
    if not units:
        return Found(Placement.of(cluster, [], []), 0, 0, 0, 0)
    plans = Plans([prune(unit) for unit in units] if pruning else units, cluster)
    best = min(plans, key=lambda plan: plan.cost, default=None)
    bound = plans.bound
    if best is not None and best.cost > bound * (1 + CLOSE):
        bound = plans.totals.stronger_bound(bound, best.cost)
    return Found(best, bound, before, sum(len(unit.options) for unit in plans.units), plans.tried)


def fits(units: Sequence[Unit], cluster: Cluster, thorough: bool = True) -> bool:
    """Whether :func:`search` finds a plan; much sooner, when it does.

    Args:
        units: as for ``search``; pruned ones give the same answer, sooner.
        cluster: the ranks.
        thorough: whether smaller pieces are tried too, as ``search`` does when nothing else fits. Without,
            ``False`` may be wrong, and takes a third of the time.
    """
    plans = Plans([prune(unit) for unit in units], cluster, thorough)
    return not units or next(iter(plans), None) is not None


def least_storage(units: Sequence[Unit], cluster: Cluster) -> Placement | None:
    """The plan that needs the least of the first kind of storage that the units take.

    However much of it there is: it need not fit the cluster's. With as much, :func:`search` finds a plan, and
    with less it finds none.

    Args:
        units, cluster: as for ``search``.

    Returns:
        ``None`` when what there is of the other kinds is too little.
    """
    return Packing([prune(unit) for unit in units], cluster).least()
