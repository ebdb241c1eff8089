"""The search against every plan there is, and its bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.planner.bound import Totals
from recemb.planner.layout import Cluster, Option, Spread, Unit, dominates, prune
from recemb.planner.placement import by_storage, place
from recemb.planner.plans import Plans
from recemb.planner.search import fits, least_storage, search

LOCAL, WORLD = 2, 4
AMPLE = 10**6


def option(key: str, spread: Spread, ms: list[float], hbm: list[int], ddr: list[int] | None = None) -> Option:
    storage = np.zeros((len(ms), 3), np.int64)
    storage[:, 0] = hbm
    storage[:, 1] = ddr or 0
    return Option(key, spread, np.asarray(ms, np.float64), storage)


def placements(chosen: Option, local: int, world: int) -> Iterator[tuple[int, ...]]:
    """Every way to put an option's shards on ranks, straight from what its spread means."""
    if chosen.spread is Spread.EVERY:
        yield tuple(range(world))
    elif chosen.spread is Spread.ANY:
        yield from product(range(world), repeat=chosen.num_shards)
    else:
        for host in range(world // local):
            ranks = range(host * local, (host + 1) * local)
            if chosen.spread is Spread.HOST:
                yield tuple(ranks)
            else:
                yield from product(ranks, repeat=chosen.num_shards)


def best_plan(units: list[Unit], capacity: list[int], local: int = LOCAL, world: int = WORLD) -> float:
    """The least time of the slowest rank over all plans that fit; infinite when none does."""
    best = math.inf

    def descend(k: int, loads: list[float], free: list[list[int]]) -> None:
        nonlocal best
        if max(loads) >= best:
            return
        if k == len(units):
            best = max(loads)
            return
        for chosen in units[k].options:
            for ranks in placements(chosen, local, world):
                after, room = list(loads), [list(r) for r in free]
                for shard, rank in enumerate(ranks):
                    after[rank] += float(chosen.ms[shard])
                    room[rank] = [f - int(s) for f, s in zip(room[rank], chosen.storage[shard], strict=True)]
                if min(map(min, room)) >= 0:
                    descend(k + 1, after, room)

    descend(0, [0.0] * world, [list(capacity) for _ in range(world)])
    return best


@st.composite
def an_option(draw: st.DrawFn, k: int) -> Option:
    spread = draw(st.sampled_from(list(Spread)))
    count = {Spread.HOST: LOCAL, Spread.EVERY: WORLD}.get(spread) or draw(st.integers(1, 2))
    even = draw(st.booleans())
    ms = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    hbm = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    ddr = draw(st.sampled_from([0, 0, 3]))
    return option(f"o{k}", spread, [ms[0]] * count if even else list(map(float, ms)), hbm, [ddr] * count)


@st.composite
def some_units(draw: st.DrawFn) -> list[Unit]:
    return [
        Unit(f"u{i}", tuple(draw(an_option(k)) for k in range(draw(st.integers(1, 3)))))
        for i in range(draw(st.integers(1, 3)))
    ]


@settings(max_examples=60)
@given(some_units(), st.integers(2, 14), st.sampled_from([0, 4, 100]))
def test_pruning_loses_nothing_and_the_bound_holds(units: list[Unit], hbm: int, ddr: int) -> None:
    capacity = [hbm, ddr, 0]
    best = best_plan(units, capacity)
    assert best_plan([prune(unit) for unit in units], capacity) == best
    cluster = Cluster.uniform(WORLD, LOCAL, capacity)
    for pruning in (True, False):
        found = search(units, cluster, pruning)
        assert found.bound <= best * (1 + 1e-6)
        if found.placement is None:
            # A heuristic may miss a plan that exists, but never makes one that does not.
            continue
        placement = found.placement
        assert placement.cost >= best * (1 - 1e-9)
        assert placement.cost <= found.bound * (1 + found.gap) * (1 + 1e-9)
        loads, used = np.zeros(WORLD), np.zeros((WORLD, 3), np.int64)
        for chosen, ranks in zip(placement.options, placement.ranks, strict=True):
            assert tuple(ranks.tolist()) in set(placements(chosen, LOCAL, WORLD))
            np.add.at(loads, ranks, chosen.ms)
            np.add.at(used, ranks, chosen.storage)
        np.testing.assert_allclose(loads, placement.loads)
        np.testing.assert_array_equal(used, placement.used)
        assert (used <= capacity).all()


@settings(max_examples=100)
@given(some_units(), st.integers(3, 14))
def test_a_plan_that_exists_is_found(units: list[Unit], hbm: int) -> None:
    """Packing is NP-hard, so this cannot hold for all units; it does for these."""
    if best_plan(units, [hbm, 3, 0]) < math.inf:
        assert search(units, Cluster.uniform(WORLD, LOCAL, [hbm, 3, 0])).placement is not None


@settings(max_examples=150)
@given(some_units(), st.integers(1, 14), st.sampled_from([0, 2, 4, 100]), st.booleans())
def test_whether_a_plan_is_found_is_known_without_it(
    units: list[Unit], hbm: int, ddr: int, pruned: bool
) -> None:
    cluster = Cluster.uniform(WORLD, LOCAL, [hbm, ddr, 0])
    asked = [prune(unit) for unit in units] if pruned else units
    found = search(units, cluster).placement is not None
    assert fits(asked, cluster) == found
    # A quick look may miss a plan and never makes one; what is hopeless is so by every plan there is.
    assert not fits(asked, cluster, thorough=False) or found
    if Plans(asked, cluster).hopeless():
        assert best_plan(units, [hbm, ddr, 0]) == math.inf


@settings(max_examples=60)
@given(some_units())
def test_without_a_bound_on_storage_the_plan_is_near_the_best(units: list[Unit]) -> None:
    found = search(units, Cluster.uniform(WORLD, LOCAL, [AMPLE] * 3))
    assert found.placement is not None
    # Graham: LPT is within 4/3 - 1/(3W) of the best for one choice of options.
    assert found.placement.cost <= best_plan(units, [AMPLE] * 3) * 4 / 3


@given(an_option(0), an_option(1))
def test_a_dominated_option_can_be_replaced_on_any_ranks(a: Option, b: Option) -> None:
    if not dominates(a, b):
        return
    for ranks in placements(b, LOCAL, WORLD):
        ms, storage = np.zeros(WORLD), np.zeros((WORLD, 3), np.int64)
        np.add.at(ms, list(ranks), b.ms)
        np.add.at(storage, list(ranks), b.storage)
        for other in placements(a, LOCAL, WORLD):
            own, bytes_own = np.zeros(WORLD), np.zeros((WORLD, 3), np.int64)
            np.add.at(own, list(other), a.ms)
            np.add.at(bytes_own, list(other), a.storage)
            if (own <= ms).all() and (bytes_own <= storage).all():
                break
        else:
            pytest.fail(f"{b} on {ranks} has no replacement by {a}")


def test_the_bound_is_area_or_the_longest_shard() -> None:
    cluster = Cluster.uniform(4, 2, [AMPLE] * 3)
    equal = [Unit(f"u{i}", (option("tw", Spread.ANY, [3.0], [1]),)) for i in range(8)]
    assert Totals.of(equal, cluster).lower_bound() == pytest.approx(6)
    one = [*equal[:3], Unit("long", (option("tw", Spread.ANY, [50.0], [1]),))]
    assert Totals.of(one, cluster).lower_bound() == pytest.approx(50)


def test_storage_raises_the_bound() -> None:
    """A fast option that needs 10 bytes and a slow one that needs 1, on 4 ranks of 10 bytes."""
    units = [
        Unit(
            f"u{i}",
            (option("fast", Spread.ANY, [1.0], [10]), option("slow", Spread.ANY, [4.0], [1])),
        )
        for i in range(8)
    ]
    cluster = Cluster.uniform(4, 2, [10, 0, 0])
    # 40 bytes: x units fast, 10 x + 8 - x <= 40, so x <= 32/9: mean of x + 4 (8 - x) over 4 ranks.
    assert Totals.of(units, cluster).lower_bound() == pytest.approx((8 * 4 - 3 * 32 / 9) / 4, rel=1e-3)
    found = search(units, cluster)
    assert found.placement is not None
    assert found.placement.cost == best_plan(units, [10, 0, 0])


def test_more_bytes_than_there_are_fit_nowhere() -> None:
    units = [
        Unit("u", (option("tw", Spread.ANY, [1.0], [7]), option("rw", Spread.EVERY, [1.0] * 4, [6] * 4)))
    ]
    found = search(units, Cluster.uniform(4, 2, [5, 0, 0]))
    assert found.placement is None
    assert found.gap == math.inf


def test_a_tight_packing_is_found_by_storage() -> None:
    """By time, the short large shard comes last and finds no rank with room."""
    units = [Unit(f"u{i}", (option("tw", Spread.ANY, [5.0 + i], [3]),)) for i in range(4)]
    units.append(Unit("large", (option("tw", Spread.ANY, [0.5], [6]),)))
    cluster = Cluster.uniform(3, 1, [6, 0, 0])
    assert place([unit.options[0] for unit in units], cluster) is None
    assert place([unit.options[0] for unit in units], cluster, by_storage(cluster)) is not None
    assert search(units, cluster).placement is not None


def test_a_grid_takes_different_hosts() -> None:
    grid = option("grid", Spread.HOST, [1.0] * 4, [1] * 4)
    placed = place([grid], Cluster.uniform(6, 2, [10, 0, 0]))
    assert placed is not None
    assert placed.ranks[0].tolist() == [0, 1, 2, 3]


def test_no_units_is_an_empty_plan() -> None:
    found = search([], Cluster.uniform(4, 2, [1, 1, 0]))
    assert found.placement is not None
    assert found.placement.cost == 0


def uneven_units(seed: int, count: int) -> list[Unit]:
    """Tables of log-normal sizes in HBM on one rank, there on every rank, or slowly in DDR."""
    draw = np.random.default_rng(seed)
    units = []
    for i in range(count):
        size, ms = int(draw.lognormal(5, 1.5)) + 4, float(draw.lognormal(0, 1))
        parts = [-(-size // WORLD)] * WORLD
        options = [option("tw", Spread.ANY, [ms], [size]), option("rw", Spread.EVERY, [ms] * WORLD, parts)]
        options.append(option("ddr", Spread.ANY, [30 * ms], [size // 20], [size]))
        units.append(Unit(f"u{i}", tuple(options)))
    return units


@pytest.mark.parametrize(("seed", "count", "ddr"), [(6, 12, 400), (8, 9, 150), (14, 7, 700), (22, 7, 700)])
def test_what_fits_fits_in_more_too(seed: int, count: int, ddr: int) -> None:
    """Where HBM is scarce; by the search for the least time alone the answer goes back and forth."""
    units = uneven_units(seed, count)
    least = least_storage(units, Cluster.uniform(WORLD, LOCAL, [0, ddr, 0]))
    assert least is not None
    needed = int(least.used[:, 0].max())
    whole = sum(int(unit.options[0].storage[0, 0]) for unit in units)
    ladder = sorted({needed - 1, needed, needed + 1, *(whole * step // 160 for step in range(20, 64))})
    found = [fits(units, Cluster.uniform(WORLD, LOCAL, [hbm, ddr, 0])) for hbm in ladder]
    assert found == [hbm >= needed for hbm in ladder]


@settings(max_examples=60)
@given(some_units(), st.sampled_from([0, 2, 4, 100]), st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_what_fits_uneven_ranks_fits_in_more_too(units: list[Unit], ddr: int, less: list[int]) -> None:
    capacity = np.asarray([[20 - own, ddr, 0] for own in less])
    found = [fits(units, Cluster(LOCAL, np.maximum(0, capacity - [taken, 0, 0]))) for taken in range(20)]
    assert found == sorted(found, reverse=True)
