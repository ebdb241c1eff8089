"""How a table's look-ups fall on its rows, from the statistics that ``recemb prepare`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from recemb.errors import DataError
from recemb.planner.tiers import Rows

Point = tuple[float, float]


def row_frequencies(feature: Mapping[str, Any], lookups: float, train_rows: int) -> tuple[Rows, ...]:
    """Rows of a feature's table in groups of equal frequency, most frequent first.

    ``stats.json`` says exactly what share of the look-ups the 1, 10, 100, ... most frequent rows take, and
    how many tokens occurred 2^k times or more; with the out-of-vocabulary row, those tokens take at least
    their own look-ups. The groups are the least concave curve through all of it: no set of rows takes fewer
    look-ups than they say.

    Args:
        feature: an entry of ``features``.
        lookups: of the table in a step.
        train_rows: of the training split, one look-up each.

    Raises:
        DataError: an entry that is not as ``recemb prepare`` writes it.
    """
    try:
        rows = int(feature["num_embeddings"])
        points = [(float(count), float(share)) for count, share in feature["top_share"].items()]
        tokens = taken = 0.0
        for bucket in sorted(feature["count_histogram"], key=lambda entry: -entry["min_count"]):
            tokens += bucket["rows"]
            taken += bucket["lookups"]
            points.append((min(tokens + 1, rows), min(1.0, taken / max(1, train_rows))))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        name = feature.get("name", "?") if isinstance(feature, Mapping) else "?"
        raise DataError(
            f"feature {name!r} of the statistics is damaged ({error!r}); prepare it again"
        ) from None
    hull = _concave([(0.0, 0.0), *(p for p in points if 0 < p[0] <= rows), (float(rows), 1.0)])
    groups = []
    for (start, before), (end, after) in pairwise(hull):
        count = round(end) - round(start)
        if count:
            groups.append(Rows(count, (after - before) * lookups / count))
    return tuple(groups)


def _concave(points: list[Point]) -> list[Point]:
    """The corners of the least concave curve on or above the points, from left to right."""
    highest: dict[float, float] = {}
    for x, y in points:
        highest[x] = max(y, highest.get(x, 0.0))
    hull: list[Point] = []
    for x, y in sorted(highest.items()):
        while len(hull) >= 2 and _below(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _below(a: Point, b: Point, c: Point) -> bool:
    """Whether ``b`` lies on or below the line from ``a`` to ``c``."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])
