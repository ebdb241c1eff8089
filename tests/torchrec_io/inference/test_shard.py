"""``shard_quant_model`` on the CPU, over one and two devices of one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torchrec.distributed.global_settings import get_propogate_device, set_propogate_device
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.quant_embeddingbag import ShardedQuantEmbeddingBagCollection
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.inference.modules import shard_quant_model as torchrec_shard_quant_model
from torchrec.quant.embedding_modules import quant_prep_enable_quant_state_dict_split_scale_bias_for_types

from recemb import EmbeddingBagCollection, QuotientRemainder, TensorTrain
from recemb.errors import BatchError, ConfigError
from recemb.torchrec_io import quantize_embeddings, shard_quant_model
from tests.torchrec_io.inference.models import KEYS, Served, batch, collection, request


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = get_propogate_device()
    yield
    set_propogate_device(before)


def _constraints(sharding: str) -> dict[str, ParameterConstraints]:
    narrow = 4 if sharding == "column_wise" else None
    constraint = ParameterConstraints(
        sharding_types=[sharding], compute_kernels=["quant"], min_partition=narrow
    )
    return {"t1": constraint, "t5": constraint}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "sharding"),
    [
        (torch.int8, "table_wise"),
        (torch.int8, "row_wise"),
        (torch.int8, "column_wise"),
        (torch.float16, "table_wise"),
    ],
)
def test_a_sharded_model_gives_the_same(dtype: torch.dtype, sharding: str, world_size: int) -> None:
    # Row-wise tables of sums, whose bags are weighted here.
    weighted = sharding == "row_wise"
    trained = Served(collection(weighted))
    if sharding == "column_wise":
        quant_prep_enable_quant_state_dict_split_scale_bias_for_types(trained, [EmbeddingBagCollection])
    model = quantize_embeddings(trained, dtype)
    given = request(5, weighted)
    expected, keys = model(*given), model.ebc(batch(*given)).keys()
    sharded, plan = shard_quant_model(
        model,
        world_size=world_size,
        compute_device="cpu",
        sharding_device="cpu",
        constraints=_constraints(sharding),
    )
    assert get_propogate_device()
    assert type(sharded.ebc.dense) is ShardedQuantEmbeddingBagCollection
    placed = plan.plan["ebc.dense"]
    assert set(placed) == {"t1", "t5"}
    assert {parameter.sharding_type for parameter in placed.values()} == {sharding}
    if world_size == 2:
        assert {rank for parameter in placed.values() for rank in parameter.ranks} == {0, 1}
    assert sharded.ebc(batch(*given)).keys() == keys
    torch.testing.assert_close(sharded(*given), expected, rtol=2e-6, atol=2e-6)
    assert not sharded(*request(2, weighted, most=1)).any()


def test_a_bad_id_of_a_sharded_table_is_named() -> None:
    model = quantize_embeddings(Served(collection()), torch.int8)
    sharded, _ = shard_quant_model(model, compute_device="cpu", sharding_device="cpu")
    lengths = torch.ones(len(KEYS), 2, dtype=torch.int64)
    ids = torch.zeros(lengths.numel(), dtype=torch.int64)
    ids[2 * KEYS.index("f5")] = 10**6
    with pytest.raises(BatchError, match=r"feature 'f5' \(table 't5'\), sample 0"):
        sharded(ids, lengths)


def test_compressed_tables_have_no_plan() -> None:
    model = quantize_embeddings(Served(collection()), torch.int8)
    constraints = {"t0": ParameterConstraints(sharding_types=["row_wise"])}
    with pytest.raises(ConfigError, match="table 't0' of 'ebc' is compressed, and replicated"):
        shard_quant_model(model, compute_device="cpu", sharding_device="cpu", constraints=constraints)
    with pytest.raises(ConfigError, match="this is a collection; wrap it in a module"):
        shard_quant_model(model.ebc, compute_device="cpu", sharding_device="cpu")


@pytest.mark.parametrize("how", ["constraints", "any", "plan"])
def test_means_are_not_split_by_rows(how: str) -> None:
    model = quantize_embeddings(Served(collection()), torch.int8)
    options: dict[str, object] = {"constraints": _constraints("row_wise")}
    if how == "any":
        options = {"constraints": {"t1": ParameterConstraints(compute_kernels=["quant"])}}
    elif how == "plan":
        spec = ParameterSharding(sharding_type="row_wise", compute_kernel="quant", ranks=[0, 1])
        options = {"sharding_plan": ShardingPlan({"ebc.dense": EmbeddingModuleShardingPlan({"t5": spec})})}
    with pytest.raises(ConfigError, match=r"'t[15]' has mean pooling and may be split by rows"):
        shard_quant_model(model, world_size=2, compute_device="cpu", sharding_device="cpu", **options)


def test_what_torchrec_does_not_do_alone() -> None:
    # Its own defaults fail on half precision, and leave int8 weights to be loaded.
    set_propogate_device(True)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'shape'"):
        torchrec_shard_quant_model(
            quantize_embeddings(Served(collection()), torch.float16),
            compute_device="cpu",
            sharding_device="cpu",
        )


def test_a_model_without_uncompressed_tables_is_left_alone() -> None:
    trained = collection(compressions=(TensorTrain(rank=8), QuotientRemainder(collisions=9)))
    model = quantize_embeddings(Served(trained), torch.int8)
    given = request(3)
    expected = model(*given)
    sharded, plan = shard_quant_model(model, compute_device="cpu", sharding_device="cpu")
    assert not plan.plan
    assert torch.equal(sharded(*given), expected)
