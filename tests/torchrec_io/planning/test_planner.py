"""Whole plans: no worse than torchrec's own, within the ranks' storage, and such as recemb can run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchrec
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError

from recemb.errors import ConfigError
from recemb.planner.costs import default_costs
from recemb.planner.layout import prune
from recemb.planner.search import search
from recemb.spec import Compression, Dense
from recemb.torchrec_io import get_sharders, planner
from recemb.torchrec_io.planning.planned import Ranks, Request, plan_tables
from recemb.torchrec_io.planning.search import cluster_of, rank_loads, units_of
from recemb.torchrec_io.planning.summary import reasons
from recemb.torchrec_io.sharding.placement import check_plan
from recemb.torchrec_io.sharding.tables import CompressedTables
from tests.torchrec_io.planning.models import CACHED, MIXED, ROWS, Model, ranks

BATCH = 256


def limits(seed: int) -> dict[str, ParameterConstraints]:
    draw = np.random.default_rng(seed)
    return {name: ParameterConstraints(pooling_factors=[float(draw.integers(1, 40))]) for name in ROWS}


@pytest.mark.parametrize("hbm", [10**9, 4_000_000])
def test_no_slower_than_torchrecs_plan(hbm: int) -> None:
    dense: dict[str, Compression] = {name: Dense() for name in ROWS}
    for seed in range(3):
        cluster, model = ranks(4, 2, hbm=hbm), Model(dense)
        torchrecs = EmbeddingShardingPlanner(
            topology=cluster,
            batch_size=BATCH,
            constraints=limits(seed),
            enumerator=EmbeddingEnumerator(cluster, BATCH, limits(seed)),
            storage_reservation=FixedPercentageStorageReservation(0.0),
            proposer=[GreedyProposer(), GreedyProposer(use_depth=False)],
            stats=[],
            debug=False,
        )
        torchrecs.plan(model, get_sharders())
        own = planner(cluster, BATCH, limits(seed), FixedPercentageStorageReservation(0.0))
        own.plan(model, get_sharders())
        ours = rank_loads(own._best_plan, 4).max()
        assert ours <= rank_loads(torchrecs._best_plan, 4).max() * (1 + 1e-9)
        used = np.zeros(4)
        for option in own._best_plan:
            np.add.at(used, [shard.rank for shard in option.shards], [s.storage.hbm for s in option.shards])
        assert used.max() <= hbm


def test_pruned_and_unpruned_searches_find_the_same_time() -> None:
    made = planner(ranks(4, 2), BATCH, limits(0))
    units = units_of(made._enumerator.enumerate(Model(MIXED), get_sharders()))
    cluster = cluster_of(ranks(4, 2))
    fewer = sum(len(prune(unit).options) for unit in units)
    assert fewer < sum(len(unit.options) for unit in units)
    pruned, whole = search(units, cluster), search(units, cluster, pruning=False)
    assert pruned.placement is not None
    assert whole.placement is not None
    assert pruned.placement.cost == pytest.approx(whole.placement.cost, rel=max(pruned.gap, whole.gap) + 1e-9)
    assert pruned.bound == pytest.approx(whole.bound, rel=1e-6)


@pytest.mark.parametrize(("device", "world"), [("cuda", 8), ("cpu", 2)])
def test_a_mixed_plan_can_be_run(device: str, world: int) -> None:
    model = Model(MIXED)
    plan = planner(ranks(world, 2, device), BATCH, limits(1)).plan(model, get_sharders())
    check_plan(CompressedTables.of(model.ebc), list(MIXED), plan.plan["ebc"], world)
    a, b = plan.plan["ebc"]["robe_a"], plan.plan["ebc"]["robe_b"]
    assert (a.sharding_type, a.ranks) == (b.sharding_type, b.ranks)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_collections_of_torchrecs_are_planned_beside_ours(device: str) -> None:
    """Of a module that is not pooled torchrec learns only while estimating that it has no weights."""
    model = Model(MIXED)
    model.sequence = torchrec.EmbeddingCollection(
        tables=[
            torchrec.EmbeddingConfig(
                num_embeddings=1000, embedding_dim=16, name=f"s{k}", feature_names=[f"s{k}"]
            )
            for k in range(2)
        ],
        device=torch.device("meta"),
    )
    plan = planner(ranks(2, 2, device), BATCH).plan(model, get_sharders())
    assert list(plan.plan["sequence"]) == ["s0", "s1"]
    assert list(plan.plan["ebc"]) == list(MIXED)
    options = planner(ranks(2, 2, device), BATCH)._enumerator.enumerate(model, get_sharders())
    own = [option for option in options if option.name == "s1"]
    assert own
    assert all(shard.perf is not None and shard.perf.total > 0 for option in own for shard in option.shards)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_uncompressed_tables_with_adam_are_planned_for_the_cpu(device: str) -> None:
    """The engine steps them there, and takes fewer sharding types than fbgemm."""
    model = Model(MIXED, device)
    _apply_optimizer_in_backward(torch.optim.Adam, model.ebc.parameters(), {"lr": 0.1})
    plan = planner(ranks(2, 2, "cpu"), BATCH, limits(1)).plan(model, get_sharders())
    ours = CompressedTables.of(model.ebc, torch.device("cpu"))
    assert list(ours.specs) == list(MIXED)
    check_plan(ours, list(MIXED), plan.plan["ebc"], 2)


def test_the_part_kept_free_is_of_ddr_too() -> None:
    """On a CPU tables lie in DDR, of which torchrec keeps nothing free."""
    model = Model({"big": Dense()})
    weights = ROWS["big"] * 16 * 4
    cluster = ranks(1, 1, "cpu", ddr=int(1.5 * weights))
    planner(cluster, BATCH, None, FixedPercentageStorageReservation(0.1)).plan(model, get_sharders())
    with pytest.raises(PlannerError, match="insufficient storage"):
        planner(cluster, BATCH, None, FixedPercentageStorageReservation(0.5)).plan(model, get_sharders())


def test_a_group_is_placed_on_a_rank_with_room_for_all_of_it() -> None:
    """The array, on the account of its first table, and the buffers of both."""
    only = {name: MIXED[name] for name in ("robe_a", "robe_b")}
    own = planner(ranks(2, 2), BATCH, {n: ParameterConstraints(sharding_types=["table_wise"]) for n in only})
    plan = own.plan(Model(only), get_sharders())
    assert plan.plan["ebc"]["robe_a"].ranks == plan.plan["ebc"]["robe_b"].ranks


def test_a_group_constrained_apart_is_refused() -> None:
    kinds = {"robe_a": ["table_wise"], "robe_b": ["data_parallel"]}
    apart = {name: ParameterConstraints(sharding_types=allowed) for name, allowed in kinds.items()}
    with pytest.raises(ConfigError, match=r"\['robe_a', 'robe_b'\] share one array"):
        planner(ranks(2, 2), BATCH, apart).plan(Model(MIXED), get_sharders())


@pytest.mark.parametrize(
    ("tables", "said"),
    [(MIXED, "lie on one rank or on all: "), (CACHED, "lie on one rank: planned on rank ")],
)
def test_why_a_group_lies_where_it_does(tables: dict[str, Compression], said: str) -> None:
    factors, costs = (1.0,) * len(tables), default_costs("cuda")
    asked = Ranks(4, 2, 10**9, 10**9, 0.1)
    request = Request(tuple(Model(tables).tables), factors, BATCH, "sgd", asked, costs)
    (reason,) = reasons(plan_tables(request))
    assert said in reason


def test_constraints_hold() -> None:
    own = {
        **limits(0),
        "big": ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused_uvm"]),
    }
    plan = planner(ranks(), BATCH, own).plan(Model(MIXED), get_sharders())
    big = plan.plan["ebc"]["big"]
    assert (big.sharding_type, big.compute_kernel, big.ranks) == ("row_wise", "fused_uvm", [0, 1, 2, 3])


def test_what_does_not_fit_is_torchrecs_error() -> None:
    with pytest.raises(PlannerError, match="insufficient storage"):
        planner(ranks(2, 2, hbm=100_000, ddr=100_000), BATCH).plan(Model(MIXED), get_sharders())


def test_the_plan_is_the_one_that_the_search_found() -> None:
    """Its ranks too: LPT alone is not as fast here."""
    made = planner(ranks(4, 2), BATCH, limits(3))
    made.plan(Model(dict.fromkeys([f"t{k}" for k in range(9)], Dense()) | MIXED), get_sharders())
    found = made._proposers[0].found
    np.testing.assert_allclose(rank_loads(made._best_plan, 4), found.placement.loads)


def test_plans_are_equal_each_time() -> None:
    plans = [planner(ranks(8, 4), BATCH, limits(2)).plan(Model(MIXED), get_sharders()) for _ in range(2)]
    assert plans[0] == plans[1]
