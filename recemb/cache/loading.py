"""Which saved caches a cache can load: ids with their rows, as many, and counters of its own policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from recemb.spec import CachePolicy

# Whose counters these are, in place of the spare bucket's owner, which nothing else reads: a state keeps its
# keys and shapes, and one that was saved before has -1 there. Saved states hold these numbers.
MARKS: dict[CachePolicy, int] = {"lfu": -2, "lru": -3, "importance": -4}


def misfit_of_state(
    table: str, capacity: int, policy: CachePolicy | None, state: Mapping[str, Any], prefix: str
) -> str:
    """Why a cache cannot load a state; empty where it can, or the state has nothing of it.

    Args:
        table: its table's name.
        capacity: C, how many rows it holds.
        policy: its own; ``None`` for one that counts nothing, as when quantised.
        state: what is loaded.
        prefix: of the cache's keys in it.
    """
    has_ids, has_rows = holds_part_of(state, prefix)
    if has_ids != has_rows:
        held, lacks = ("ids", "rows (weight)") if has_ids else ("rows (weight)", "ids")
        return (
            f"table {table!r}: the state to load has the {held} of its cache and not the {lacks}, by which "
            "other rows would be looked up; load both, or leave out all of the cache and load with "
            "strict=False, which starts an empty one"
        )
    ids, owners = (_flat(state.get(prefix + name)) for name in ("ids", "owners"))
    if ids is not None and ids.numel() != capacity:
        return (
            f"table {table!r}: its cache has {ids.numel():,} rows in the state to load and {capacity:,} "
            f"here; build the table with cache=HotRows(rows={ids.numel()})"
        )
    if policy is None or owners is None or owners.is_meta:
        return ""
    return policy_misfit(table, policy, owners)


def holds_part_of(state: Iterable[str], prefix: str) -> tuple[bool, bool]:
    """Whether a state has the ids of a cache, and its rows, which have longer names where they are pruned."""
    names = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    return "ids" in names, any("weight" in name for name in names)


def _flat(value: Any) -> Tensor | None:
    """A buffer of a cache; ``None`` for what is none, which torch refuses, and for another rank's, [0]."""
    return value if isinstance(value, Tensor) and value.dim() == 1 and value.numel() else None


def policy_of(owners: Tensor) -> CachePolicy | None:
    """Whose counters these are, [K + 1] or the last of them; ``None`` where that was not noted yet."""
    mark = int(owners[-1])
    return next((policy for policy, known in MARKS.items() if known == mark), None)


def policy_misfit(table: str, own: CachePolicy, owners: Tensor) -> str:
    """What is wrong with counters of another policy, which counts other things; empty if nothing is.

    Args:
        table: its name.
        own: the policy of its cache.
        owners: [K + 1] of the counters.
    """
    theirs = policy_of(owners) or own
    if theirs == own:
        return ""
    return (
        f"table {table!r}: the counters of its cache are of policy={theirs!r}, and it has policy={own!r}, "
        f"which counts other things. Give it HotRows(policy={theirs!r}); or, to count anew, leave the "
        "cache's scores, owners and votes out of the state and load it with strict=False"
    )
