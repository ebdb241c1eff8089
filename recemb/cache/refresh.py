"""Exchanging rows between two training steps: evict and write back, then promote."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recemb.backends.base import Backend, Leaving
from recemb.backends.native import owner_of
from recemb.cache.hot_rows import Exchange, HotRowCache
from recemb.cache.optimizer_state import reset_in_backward
from recemb.errors import NonFiniteError

_Plan = tuple[Backend, HotRowCache, Exchange]
# At 10 an exchange moves the mean row outside by at most about a sixth of what the rows that leave lack.
_CARE = 10


@torch.no_grad()
def refresh(tables: Sequence[Backend]) -> None:
    """Exchange the rows of some cached tables.

    All rows that leave, of all tables, are written back before any row enters: a row that enters reads
    parameters that a write-back may have moved. Between any two writes to a tensor the tables hold every row
    once, so a state saved at any moment is a state that training has been in: a row that leaves is in the
    cache until its parameters hold it, and one that enters is in its slot before its id is.

    Args:
        tables: cached tables, each once.

    Raises:
        ConfigError: cached rows, or parameters that they are written to, are pruned or parametrized; nothing
            has changed.
        NonFiniteError: a row that leaves or enters, or a parameter that all rows are written back by, is NaN
            or infinite; nothing has changed.
    """
    pairs = [(table, cache_of(table)) for table in tables]
    for table, cache in pairs:
        written = table.written_parameters() if cache.settings.write_back else ()
        table.check_writable("an exchange of cached rows", written)
        table.renew()
    # A row that enters has the compressed value, whatever the model around it computes in.
    with torch.autocast(pairs[0][1].weight.device.type, enabled=False):
        _exchange(pairs)


def _exchange(pairs: Sequence[tuple[Backend, HotRowCache]]) -> None:
    plans = [(table, cache, cache.choose()) for table, cache in pairs]
    for table, cache, plan in plans:
        _check_finite(table, cache, plan)
    left = [(cache.ids[plan.leaving], cache.scores[plan.leaving]) for _, cache, plan in plans]
    storages: dict[Backend, list[_Plan]] = {}
    for plan_of_table in plans:
        storages.setdefault(owner_of(plan_of_table[0]), []).append(plan_of_table)
    for of_storage in storages.values():
        evict(of_storage)
    for (table, cache, plan), (ids, scores) in zip(plans, left, strict=True):
        promote(table, cache, plan)
        cache.settle(plan, ids, scores)


def evict(plans: Sequence[_Plan]) -> None:
    """Write rows of the tables of one storage back, all at once, and vacate their slots."""
    plans = [(table, cache, plan) for table, cache, plan in plans if plan.leaving.numel()]
    leaving = [
        Leaving(
            table,
            cache.ids[plan.leaving],
            cache.weight[plan.leaving],
            write_back_cost(cache, plan.leaving.numel()),
        )
        for table, cache, plan in plans
    ]
    without = [_lack(own) for own in leaving]
    written = [own for own, (_, cache, _) in zip(leaving, plans, strict=True) if cache.settings.write_back]
    if written:
        written[0].table.write_back_together(written)
    for own, before, (_, cache, plan) in zip(leaving, without, plans, strict=True):
        cache.errors += torch.stack([_lack(own), before])
        cache.ids[plan.leaving] = -1


def _lack(own: Leaving) -> Tensor:
    """[]: by how much the compressed rows miss those that leave, squared."""
    return (own.table.compressed_rows(own.ids) - own.values).float().square().sum()


def promote(table: Backend, cache: HotRowCache, plan: Exchange) -> None:
    """Fill slots with the compressed values of the ids that enter."""
    if not plan.slots.numel():
        return
    cache.weight[plan.slots] = table.compressed_rows(plan.ids)
    if cache.weight.grad is not None:
        # Of a step that has been taken, with the former row's gradient.
        cache.weight.grad[plan.slots] = 0
    cache.scores[plan.slots] = plan.scores
    reset_in_backward(cache.weight, plan.slots)
    cache.ids[plan.slots] = plan.ids
    for callback in cache.on_replace:
        callback(cache, plan.slots)


def write_back_cost(cache: HotRowCache, leaving: int) -> float:
    """What a squared change of a row that stays outside counts against the squared error of one that leaves.

    As if the mean row outside were ``_CARE`` times as dear as the mean row that leaves: its mean square
    change in one exchange is then at most 1 / (4 ``_CARE``) of what those rows lack, for each step of least
    squares (a tensor train takes one for each core). Where many leave at once that is more care than how
    often rows are looked up asks for (:func:`coldness`), which takes its place.

    Where few leave, rows of a tensor train end as near as they are in the best train of its rank for the
    table with its cached rows: 3 of 120 in the tests. That is measured, no law: 30 of 120 are off by up to
    1.1 times as much. The bound that always holds is of one core (:mod:`recemb.backends.tt_write_back`).

    Args:
        cache: the cache.
        leaving: E, how many rows leave.
    """
    return min(coldness(cache), _CARE * leaving / cache.num_embeddings)


def coldness(cache: HotRowCache) -> float:
    """How often the mean row outside a cache is looked up for each look-up of one at its edge, in (0, 1].

    Under Zipf's law with exponent 1 the row of rank r is looked up 1 / r as often as the first. That of rank
    C stands at the edge, and those of ranks C + 1 .. N have the mean (ln N - ln C) / (N - C).
    """
    rows, capacity = cache.num_embeddings, cache.capacity
    if capacity == rows:
        return 1.0
    return capacity * (math.log(rows) - math.log(capacity)) / (rows - capacity)


def cache_of(table: Backend) -> HotRowCache:
    """The cache of a table that has one."""
    assert table.cache is not None
    return table.cache


def is_frozen(table: Backend) -> bool:
    """Whether nothing is exchanged: in eval(), or cached rows, or what they go to, take no gradient.

    Nor while tensors are lent in place of parameters (``torch.func.functional_call``): which rows are cached
    would stay, and their values go.
    """
    cache = cache_of(table)
    if not cache.training:
        return True
    written = table.written_parameters() if cache.settings.write_back else ()
    named, rows = table.own_parameters(), cache.own_parameters()
    if not all(isinstance(parameter, nn.Parameter) for parameter in (*rows.values(), *named.values())):
        return True
    # What stands in a pruned one's place takes gradients or none as it was made, whatever it is made of.
    held = [named.get(name, named.get(f"{name}_orig")) for name in written]
    return not all(p.requires_grad for p in (*rows.values(), *held) if p is not None)


def _check_finite(table: Backend, cache: HotRowCache, plan: Exchange) -> None:
    """Raise unless all that an exchange reads is finite: least squares would spread what is not."""
    leaving = cache.ids[plan.leaving]
    _raise_first(table, "cached row of id {}", leaving, cache.weight[plan.leaving], "cannot be written back")
    if leaving.numel() and cache.settings.write_back:
        for name in table.read_to_write_back():
            parameter = table.weights()[name]
            rows = torch.arange(len(parameter), device=parameter.device)
            _raise_first(table, f"row {{}} of {name}", rows, parameter, "no row can be written back by it")
    for ids, why in ((leaving, "a cached one cannot be written to it"), (plan.ids, "cannot be cached")):
        _raise_first(table, "compressed row of id {}", ids, table.compressed_rows(ids), why)


def _raise_first(table: Backend, what: str, ids: Tensor, values: Tensor, why: str) -> None:
    bad = ~torch.isfinite(values).all(dim=1)
    if bool(bad.any()):
        raise NonFiniteError(
            f"table {table.table.name!r}: the {what.format(int(ids[bad][0]))} is NaN or infinite and {why}; "
            "training has diverged: lower the learning rate, or look for infinite inputs"
        )
