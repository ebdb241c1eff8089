"""Simple sharding rules to compare a plan with: each table whole on one rank, by one figure per table.

The greedy rules are AutoShard's baselines (Zha et al., KDD 2022, arXiv 2208.06399): tables in falling order
of a cost, each to the rank whose tables' costs sum up to least and that has room. ``lpt`` is the same by the
time of each table, longest first, a baseline of EcoRec (SC 2024). All are rated by the planner's own times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recemb.planner.layout import Cluster, Option, Spread
from recemb.planner.placement import Placement, place


@dataclass(frozen=True)
class Figures:
    """What the rules know of a table, or of the tables that share an array.

    Attributes:
        size: parameters as stored; of an uncompressed table rows times columns.
        rows: of the largest table.
        dim: columns.
        lookups: ids a sample times columns.
        option: the unit whole on one rank.
    """

    size: float
    rows: float
    dim: float
    lookups: float
    option: Option


RULES = ("size", "dim", "lookups", "size_lookups", "lpt")


def cost(figures: Figures, rule: str) -> float:
    """A table's cost under a rule; ``size_lookups`` takes the logarithm of the size, as AutoShard does."""
    return {
        "size": figures.size,
        "dim": figures.dim,
        "lookups": figures.lookups,
        "size_lookups": figures.lookups * math.log10(max(figures.rows, 10)),
        "lpt": float(figures.option.ms.sum()),
    }[rule]


def baselines(tables: Sequence[Figures], cluster: Cluster) -> Mapping[str, Placement | None]:
    """Of each rule where the tables lie and their times, or ``None`` when one finds no rank with room."""
    return {rule: _placed(tables, rule, cluster) for rule in RULES}


def _placed(tables: Sequence[Figures], rule: str, cluster: Cluster) -> Placement | None:
    weighed = [
        Option(rule, Spread.ANY, np.asarray([cost(table, rule)]), table.option.storage) for table in tables
    ]
    placed = place(weighed, cluster)
    if placed is None:
        return None
    loads = np.zeros(cluster.world_size)
    for table, ranks in zip(tables, placed.ranks, strict=True):
        np.add.at(loads, ranks, table.option.ms)
    return Placement(cluster, [table.option for table in tables], placed.ranks, loads, placed.free)
