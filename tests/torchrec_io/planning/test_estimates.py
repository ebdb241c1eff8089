"""Options and their estimates: torchrec's own where a table is uncompressed, exact bytes where it is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption, Topology
from torchrec.distributed.types import CacheParams
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recemb.backends import storages
from recemb.errors import ConfigError
from recemb.planner.costs import default_costs
from recemb.planner.gpu_workspace import gpu_workspace
from recemb.planner.work import Load, distinct, optimizer_bytes
from recemb.spec import Compression, Dense, HotRows, QuotientRemainder, TensorTrain
from recemb.torchrec_io import get_sharders, planner
from recemb.torchrec_io.planning.enumerator import EveryRank
from recemb.torchrec_io.sharding.placement import check_plan
from recemb.torchrec_io.sharding.tables import CompressedTables
from recemb_kernels.triton_frame import MICRO_BATCH_ROWS
from tests.torchrec_io.planning.models import CACHED, MIXED, ROWS, Model, ranks

BATCH = 64


def options_of(
    made: EmbeddingShardingPlanner, model: nn.Module
) -> dict[tuple[str, str, str], ShardingOption]:
    found = made._enumerator.enumerate(model, get_sharders())
    return {(option.name, option.sharding_type, option.compute_kernel): option for option in found}


def stock(cluster: Topology, constraints: dict[str, ParameterConstraints]) -> EmbeddingShardingPlanner:
    return EmbeddingShardingPlanner(
        topology=cluster,
        batch_size=BATCH,
        constraints=constraints,
        enumerator=EmbeddingEnumerator(cluster, BATCH, constraints),
        storage_reservation=FixedPercentageStorageReservation(0.15),
        stats=[],
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_uncompressed_tables_have_torchrecs_options_and_estimates(device: str) -> None:
    dense: dict[str, Compression] = {name: Dense() for name in ROWS}
    model = Model(dense)
    # A table of 30 rows leaves some of 8 ranks a shorter shard; one of 3 leaves some without rows.
    constraints = {
        "big": ParameterConstraints(pooling_factors=[7.0], min_partition=4),
        "tt": ParameterConstraints(pooling_factors=[0.5], is_weighted=True),
        "md": ParameterConstraints(cache_params=CacheParams(load_factor=0.1)),
        "qr": ParameterConstraints(sharding_types=["grid_shard", "row_wise"], min_partition=8),
    }
    if device == "cpu":
        del constraints["qr"]
    _apply_optimizer_in_backward(RowWiseAdagrad, model.ebc.parameters(), {"lr": 0.1})
    cluster = ranks(8, 4, device)
    own = options_of(planner(cluster, BATCH, constraints), model)
    torchrecs = options_of(stock(cluster, constraints), model)
    assert own.keys() == torchrecs.keys()
    assert {len(option.shards) for option in own.values()} >= {1, 8}
    for key, option in own.items():
        expected = torchrecs[key]
        assert len(option.shards) == len(expected.shards)
        for shard, other in zip(option.shards, expected.shards, strict=True):
            assert (shard.size, shard.offset) == (list(other.size), list(other.offset)), key
            assert (shard.storage, shard.perf) == (other.storage, other.perf), key


def test_shards_on_every_rank_are_few_objects() -> None:
    own = options_of(planner(ranks(64, 8), BATCH), Model({"big": Dense()}))
    shards = own["big", "row_wise", "fused"].shards
    assert isinstance(shards, EveryRank)
    assert len(shards.distinct) == 2
    assert [shard.rank for shard in shards] == list(range(64))
    assert sum(shard.size[0] for shard in shards) == ROWS["big"]
    assert shards[-1].rank == 63
    assert [shard.rank for shard in shards[2:4]] == [2, 3]


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam, RowWiseAdagrad]
)
def test_bytes_of_compressed_tables_are_those_of_built_ones(optimizer: type[torch.optim.Optimizer]) -> None:
    compressed = {name: c for name, c in MIXED.items() if not isinstance(c, Dense)}
    model = Model(compressed | CACHED, device="cpu")
    plain = options_of(planner(ranks(), BATCH), model)
    _apply_optimizer_in_backward(optimizer, model.ebc.parameters(), {"lr": 0.1})
    with_state = options_of(planner(ranks(), BATCH), model)
    for _, peers in storages(model.tables):
        built = nn.ModuleList(model.ebc.embedding_bags[table.name] for table in peers)
        parameters = list(built.parameters())
        # Cached rows are parameters; which they are and how hot ids have been are buffers.
        stored = sum(tensor.numel() * tensor.element_size() for tensor in built.state_dict().values())
        # torchrec's buffers of a table-wise shard: ids and pooled rows of every rank's batch.
        buffers = BATCH * 4 * (8 + 16 * 4)
        for peer in peers:
            key = peer.name, "table_wise", "fused"
            expected = stored if peer is peers[0] else 0
            assert plain[key].shards[0].storage.hbm == expected + buffers
        state = 0
        for parameter in parameters:
            (made,) = parameter._in_backward_optimizers
            parameter.grad = torch.ones_like(parameter)
            made.step()
            tensors = [v for v in made.state[parameter].values() if isinstance(v, torch.Tensor)]
            # Counters of steps are a number, not a row or a weight.
            state += sum(v.numel() * v.element_size() for v in tensors if v.numel() > 1)
        own = with_state[peers[0].name, "table_wise", "fused"].shards[0].storage.hbm
        assert own - plain[peers[0].name, "table_wise", "fused"].shards[0].storage.hbm == state
        assert optimizer_bytes(peers, optimizer.__name__) == state


def test_compressed_tables_take_what_recemb_runs() -> None:
    own = options_of(planner(ranks(), BATCH), Model(MIXED))
    for name in ("tt", "robe_a"):
        assert {key[1:] for key in own if key[0] == name} == {
            ("table_wise", "fused"),
            ("data_parallel", "dense"),
        }
    assert own["robe_a", "table_wise", "fused"].dependency == own["robe_b", "table_wise", "fused"].dependency
    assert own["tt", "table_wise", "fused"].dependency is None


def test_rows_cut_over_ranks_leave_the_shorter_part_whole() -> None:
    own = options_of(planner(ranks(), BATCH), Model(MIXED))
    buffers = BATCH * (8 + 4 * 16 * 4)
    # Of 225 quotients a quarter, and all 40 remainders; of 7,000 rows of 4 a quarter, and a projection.
    assert own["qr", "row_wise", "fused"].shards[0].storage.hbm == 4 * 16 * (57 + 40) + buffers
    assert own["md", "row_wise", "fused"].shards[0].storage.hbm == 4 * (1750 * 4 + 4 * 16) + buffers
    # 225 quotients do not reach 200 ranks: there that way is left out.
    assert ("qr", "row_wise", "fused") not in options_of(planner(ranks(200, 8), BATCH), Model(MIXED))


def test_rows_are_cut_on_a_cpu_too() -> None:
    own = options_of(planner(ranks(device="cpu"), BATCH), Model(MIXED))
    assert {name for name, kind, _ in own if kind == "row_wise"} == {"qr", "md"}
    limits = {"md": ParameterConstraints(sharding_types=["row_wise"])}
    plan = planner(ranks(2, 2, "cpu"), BATCH, limits).plan(Model(MIXED), get_sharders())
    assert (plan.plan["ebc"]["md"].sharding_type, plan.plan["ebc"]["md"].ranks) == ("row_wise", [0, 1])


def test_data_parallel_holds_gradients_too() -> None:
    own = options_of(planner(ranks(), BATCH), Model(MIXED))
    whole = own["qr", "data_parallel", "dense"].shards[0].storage.hbm
    stored = 4 * 16 * (math.ceil(ROWS["qr"] / 40) + 40)
    assert whole == 3 * stored + BATCH * (8 + 16 * 4)


def test_compute_grows_with_rank_and_ids() -> None:
    def forward(rank: int, pooling: float, kind: str = "table_wise") -> float:
        limits = {"tt": ParameterConstraints(pooling_factors=[pooling])}
        model = Model({"tt": TensorTrain(rank=rank)})
        own = options_of(planner(ranks(), BATCH, limits), model)
        kernel = "fused" if kind == "table_wise" else "dense"
        return float(own["tt", kind, kernel].shards[0].perf.fwd_compute)

    assert forward(64, 1) > 3 * forward(8, 1)
    assert forward(8, 50) > 3 * forward(8, 1)
    # One rank's batch against all four's.
    assert forward(8, 1, "data_parallel") < forward(8, 1) < 4.1 * forward(8, 1, "data_parallel")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cached_table_is_planned_table_wise(device: str) -> None:
    tables = MIXED | CACHED
    own = options_of(planner(ranks(device=device), BATCH), Model(tables))
    for name in ("hot_tt", "hot_robe"):
        assert {kind for table, kind, _ in own if table == name} == {"table_wise"}
    plan = planner(ranks(device=device), BATCH).plan(Model(tables), get_sharders()).plan["ebc"]
    assert plan["hot_robe"].ranks == plan["robe_c"].ranks
    assert {plan[name].sharding_type for name in CACHED} == {"table_wise"}
    check_plan(CompressedTables.of(Model(tables).ebc), list(tables), plan, 4)


def test_a_cache_costs_what_it_takes_to_look_up_in_two_places() -> None:
    plain, cached = (
        options_of(planner(ranks(), BATCH), Model({"tt": TensorTrain(rank=8, cache=cache)}))[
            "tt", "table_wise", "fused"
        ]
        .shards[0]
        .perf
        for cache in (None, HotRows(rows=70))
    )
    assert plain.fwd_compute < cached.fwd_compute < 3 * plain.fwd_compute


def test_constraints_that_part_a_table_from_its_cache_are_refused() -> None:
    limits = {"hot_tt": ParameterConstraints(sharding_types=["data_parallel", "row_wise"])}
    with pytest.raises(ConfigError, match=r"'hot_tt' .*HotRows.* can be planned table_wise, .*data_parallel"):
        planner(ranks(), BATCH, limits).plan(Model(CACHED), get_sharders())


def test_constraints_that_recemb_cannot_follow_are_refused() -> None:
    limits = {"qr": ParameterConstraints(sharding_types=["column_wise"])}
    with pytest.raises(ConfigError, match=r"'qr'.*column_wise"):
        planner(ranks(), BATCH, limits).plan(Model({"qr": QuotientRemainder(collisions=4)}), get_sharders())


def test_a_gpu_keeps_a_whole_steps_workspace_free() -> None:
    model, cluster = Model({"tt": TensorTrain(rank=8), "qr": QuotientRemainder(collisions=4)}), ranks(1, 1)
    reservation = planner(cluster, BATCH)._storage_reservation
    free = reservation.reserve(cluster, BATCH, model, get_sharders()).devices[0].storage.hbm
    loads = [Load(table, BATCH, BATCH) for table in model.tables]
    assert reservation.workspace == gpu_workspace(loads, 1, MICRO_BATCH_ROWS)
    without = FixedPercentageStorageReservation(0.15).reserve(cluster, BATCH, model, get_sharders())
    assert without.devices[0].storage.hbm - free == reservation.workspace


def test_distinct_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1000, (64, 700), generator=generator)
    mean = sum(len(row.unique()) for row in drawn) / 64
    assert distinct(1000, 700) == pytest.approx(mean, rel=0.02)
    weights = torch.arange(1, 1001, dtype=torch.float64) ** -1.05
    zipf = torch.multinomial(weights.expand(64, -1), 700, replacement=True, generator=generator)
    mean = sum(len(row.unique()) for row in zipf) / 64
    assert distinct(1000, 700, 1.05) == pytest.approx(mean, rel=0.02)
    assert distinct(1, 10) == 1
    assert default_costs("cuda")["id_skew"] == 1.05
