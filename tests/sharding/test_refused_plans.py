"""Plans that compressed tables cannot follow are refused before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection as TorchrecEmbeddingBagCollection
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionSharder as TorchrecEmbeddingBagCollectionSharder,
)
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

from recemb import (
    ROBE,
    Compression,
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    HotRows,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)
from recemb.errors import ConfigError
from recemb.optim.attachment import Attachment
from recemb.spec import TableSpec
from recemb.torchrec_io import EmbeddingBagCollectionSharder, get_sharders
from recemb.torchrec_io.sharding.held import row_split
from tests.sharding.cases import apply_optimizer_in_backward

ROBE_SETTING = ROBE(compress_rate=10, block_size=8)


def _collection(compressions: Sequence[Compression]) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"t{k}",
                num_embeddings=1000,
                embedding_dim=16,
                feature_names=[f"f{k}"],
                compression=compression,
            )
            for k, compression in enumerate(compressions)
        ]
    )


def _shard(ebc: EmbeddingBagCollection, *ways: object, sharder: object = None) -> None:
    sharder = sharder or EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        ebc,
        {f"t{k}": way for k, way in enumerate(ways)},
        sharder=sharder,
        local_size=2,
        world_size=2,
        device_type="cpu",
    )
    sharder.shard(ebc, plan, ShardingEnv.from_local(2, 0), torch.device("cpu"))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("way", [row_wise(), column_wise([0, 1])])
def test_a_split_compressed_table(way: object) -> None:
    with pytest.raises(ConfigError, match=r"'t1' .*TensorTrain.*table_wise\(rank=...\) or data_parallel\(\)"):
        _shard(_collection([Dense(), TensorTrain(rank=4)]), row_wise(), way)


def test_a_split_of_fewer_rows_than_ranks() -> None:
    # In blocks of 8 the 14th rank would have none.
    table = TableSpec(name="t", num_embeddings=100, embedding_dim=8, compression=MixedDimension(dim=2))
    assert row_split(table, 3).rows == [34, 34, 32]
    with pytest.raises(ConfigError, match=r"'t': the 100 rows of its e do not reach 14 ranks .* table_wise"):
        row_split(table, 14)


def test_a_row_wise_plan_of_other_ranks() -> None:
    ebc, sharder = _collection([MixedDimension(dim=2)]), EmbeddingBagCollectionSharder()
    arguments = {"sharder": sharder, "local_size": 2, "world_size": 2, "device_type": "cpu"}
    plan = construct_module_sharding_plan(ebc, {"t0": row_wise()}, **arguments)
    plan["t0"].ranks = [1, 0]
    with pytest.raises(ConfigError, match=r"'t0' is planned row_wise on the ranks \[1, 0\]"):
        sharder.shard(ebc, plan, ShardingEnv.from_local(2, 0), torch.device("cpu"))


@pytest.mark.parametrize(
    "ways", [(table_wise(0), table_wise(1)), (table_wise(0), data_parallel())], ids=["ranks", "kinds"]
)
def test_a_robe_array_planned_apart(ways: tuple[object, object]) -> None:
    with pytest.raises(ConfigError, match=r"\['t0', 't1'\] share one array.*on rank 0.*groups of their own"):
        _shard(_collection([ROBE_SETTING, ROBE_SETTING]), *ways)


@pytest.mark.parametrize("way", [row_wise(), data_parallel(), column_wise([0, 1])])
def test_cached_rows_apart_from_their_table(way: object) -> None:
    # Without its cache this table could be planned row-wise and data-parallel.
    cached = QuotientRemainder(collisions=10, cache=HotRows(fraction=0.1))
    with pytest.raises(
        ConfigError,
        match=r"'t1' .*HotRows.*: its cached rows lie with it on one rank; plan it table_wise\(rank=...\)"
        r".*sharding_types=\['table_wise'\]",
    ):
        _shard(_collection([Dense(), cached]), row_wise(), way)


def test_functions_that_a_sharded_cache_would_not_call(one_rank: dist.ProcessGroup) -> None:
    ebc = _collection([Dense(), QuotientRemainder(collisions=10, cache=HotRows(rows=3))])
    on_replace = ebc.hot_row_caches()["t1"].on_replace
    on_replace.append(lambda cache, slots: None)
    sharder = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        ebc,
        {"t0": table_wise(0), "t1": table_wise(0)},
        sharder=sharder,
        local_size=1,
        world_size=1,
        device_type="cpu",
    )
    env, device = ShardingEnv.from_process_group(one_rank), torch.device("cpu")
    with pytest.raises(ConfigError, match=r"table 't1': 1 functions in on_replace .*hot_row_caches"):
        sharder.shard(ebc, plan, env, device)
    on_replace.clear()
    assert sharder.shard(ebc, plan, env, device).hot_row_caches()["t1"].on_replace == []


def test_a_cached_table_and_one_that_shares_its_array_planned_apart() -> None:
    cached = ROBE(compress_rate=10, block_size=8, cache=HotRows(fraction=0.1))
    with pytest.raises(
        ConfigError, match=r"\['t0', 't1'\] share one array.*all of them table_wise on one rank, or"
    ):
        _shard(_collection([cached, ROBE_SETTING]), table_wise(0), data_parallel())


def test_a_table_without_a_plan() -> None:
    ebc = _collection([TensorTrain(rank=4), Dense()])
    with pytest.raises(ConfigError, match=r"nothing for the tables \['t0', 't1'\]"):
        EmbeddingBagCollectionSharder().shard(ebc, {}, ShardingEnv.from_local(2, 0))


def test_an_optimizer_that_only_the_sharder_knows() -> None:
    sharder = EmbeddingBagCollectionSharder(fused_params={"learning_rate": 0.1})
    with pytest.raises(ConfigError, match=r"learning_rate.*\['t0'\].*apply_optimizer_in_backward"):
        _shard(_collection([TensorTrain(rank=4)]), table_wise(0), sharder=sharder)


def _managed(ebc: EmbeddingBagCollection) -> ManagedCollisionEmbeddingBagCollection:
    table = MCHManagedCollisionModule(
        zch_size=1000,
        device=torch.device("cpu"),
        input_hash_size=10**6,
        eviction_interval=1000,
        eviction_policy=DistanceLFU_EvictionPolicy(),
    )
    return ManagedCollisionEmbeddingBagCollection(
        ebc, ManagedCollisionCollection({"t0": table}, ebc.embedding_bag_configs())
    )


@pytest.mark.parametrize("compression", [TensorTrain(rank=4), QuotientRemainder(collisions=8)])
def test_managed_collisions(compression: Compression) -> None:
    module = _managed(_collection([compression]))
    [sharder] = [each for each in get_sharders() if each.module_type is type(module)]
    said = (
        r"\['t0'\] cannot be sharded inside a ManagedCollisionEmbeddingBagCollection.*compression=Dense\(\)"
    )
    with pytest.raises(ConfigError, match=said):
        sharder.shardable_parameters(module)
    with pytest.raises(ConfigError, match=said):
        sharder.shard(module, {}, ShardingEnv.from_local(1, 0), torch.device("cpu"))


def test_managed_collisions_of_a_sharder_of_ones_own(one_rank: dist.ProcessGroup) -> None:
    module = _managed(_collection([QuotientRemainder(collisions=8)]))
    sharder = ManagedCollisionEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder())
    plan = construct_module_sharding_plan(
        module, {"t0": row_wise()}, sharder=sharder, local_size=1, world_size=1, device_type="cpu"
    )
    with pytest.raises(ConfigError, match=r"\['t0'\] cannot be sharded inside a ManagedCollision"):
        sharder.shard(module, plan, ShardingEnv.from_process_group(one_rank), torch.device("cpu"))


def test_managed_collisions_of_uncompressed_tables_are_torchrecs() -> None:
    module = _managed(_collection([Dense()]))
    [sharder] = [each for each in get_sharders() if each.module_type is type(module)]
    assert list(sharder.shardable_parameters(module)) == ["t0"]


def test_dtensors() -> None:
    env = ShardingEnv.from_local(2, 0)
    env.output_dtensor = True
    with pytest.raises(ConfigError, match="output_dtensor=False"):
        EmbeddingBagCollectionSharder().shard(_collection([TensorTrain(rank=4)]), {}, env)


def test_two_optimizers_on_one_parameter() -> None:
    ebc = _collection([TensorTrain(rank=4)])
    for _ in range(2):
        apply_optimizer_in_backward(torch.optim.SGD, ebc.parameters(), {"lr": 0.1})
    with pytest.raises(ConfigError, match=r"t0\.core_0 has 2 optimizers"):
        EmbeddingBagCollectionSharder().shardable_parameters(ebc)


def test_planners_see_the_bytes_of_a_compressed_table_and_its_columns() -> None:
    ebc = _collection([TensorTrain(rank=4), Dense(), ROBE_SETTING, ROBE_SETTING])
    apply_optimizer_in_backward(torch.optim.Adagrad, ebc.parameters(), {"lr": 0.1})
    seen = EmbeddingBagCollectionSharder().shardable_parameters(ebc)
    stored = sum(parameter.numel() for parameter in ebc.embedding_bags["t0"].parameters())
    assert list(seen) == ["t0", "t1", "t2", "t3"]
    assert stored <= seen["t0"].numel() < stored + 16
    assert seen["t0"].is_meta
    assert seen["t0"].shape[1] == 16
    assert seen["t0"]._optimizer_classes == [torch.optim.Adagrad]
    assert seen["t1"] is ebc.embedding_bags["t1"].weight
    assert seen["t2"].numel() == ebc.embedding_bags["t2"].array.numel()
    assert seen["t3"].shape == (1, 16)


def test_an_attachment_survives_what_torchrec_does_to_its_arguments() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    arguments = {"lr": 0.1, "eps": 1e-3}
    apply_optimizer_in_backward(torch.optim.Adagrad, [parameter], arguments)
    arguments.update({"learning_rate": arguments.pop("lr"), "optimizer": "exact_adagrad"})
    parameter._in_backward_optimizers[0].param_groups[0]["lr"] = 0.3
    attachment = Attachment.of("t.p", parameter)
    assert attachment is not None
    other = torch.nn.Parameter(torch.zeros(3, 2))
    attachment.attach(other, lazy=False)
    (group,) = other._in_backward_optimizers[0].param_groups
    assert (group["lr"], group["eps"]) == (0.3, 1e-3)
    assert len(group["params"]) == 1
    assert group["params"][0] is other


def test_get_sharders_adds_to_torchrecs() -> None:
    kinds = {sharder.module_type: type(sharder) for sharder in get_sharders()}
    assert kinds[EmbeddingBagCollection] is EmbeddingBagCollectionSharder
    assert kinds[TorchrecEmbeddingBagCollection] is TorchrecEmbeddingBagCollectionSharder
