"""One rank against the unsharded collection, and torchrec's own pipelines against the plain loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchrec
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from recemb import EmbeddingBagCollection, EmbeddingBagConfig, HotRows, MixedDimension, TensorTrain
from recemb.torchrec_io import EmbeddingBagCollectionSharder
from recemb_kernels.triton_frame.graphs import GraphedGroup
from recemb_kernels.triton_frame.verdict import poll
from tests.gpu.device import BATCH, IS_REAL, needs_gpu, takes_minutes
from tests.gpu.test_collection import METHODS, collection, features, loss_of
from tests.gpu.test_graphs import batch

pytestmark = pytest.mark.gpu
PIPELINES = [TrainPipelineSparseDist, PrefetchTrainPipelineSparseDist]
# A GPU's stand-in has gloo, and none of fbgemm's kernels for uncompressed tables.
BACKEND, NAMES = ("nccl", [*METHODS]) if IS_REAL else ("gloo", [name for name in METHODS if name != "dense"])
DENSE_LR = 0.1
HOT = HotRows(rows=100 if IS_REAL else BATCH // 4, policy="lfu", refresh_every=2, warmup=1)
CACHED = {"tt": TensorTrain(rank=8, cache=HOT), "md": MixedDimension(dim=4, cache=HOT), "qr": METHODS["qr"]}


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if IS_REAL:
        torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path_factory.mktemp("rank") / "store"), 1)
    dist.init_process_group(BACKEND, store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    """A collection and a linear layer over its columns, by name: the order differs when sharded."""

    def __init__(self, ebc: EmbeddingBagCollection) -> None:
        super().__init__()
        self.ebc = ebc
        self.names = sorted(ebc._embedding_names)
        torch.manual_seed(7)
        self.lin = nn.Linear(32 * len(self.names), 3, device="cuda")

    def forward(self, kjt: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        pooled = self.ebc(kjt)
        columns = torch.cat([pooled[name] for name in self.names], dim=1)
        return loss_of(self.lin(columns)), columns


def uncached() -> EmbeddingBagCollection:
    return collection("cuda", names=NAMES)


def cached() -> EmbeddingBagCollection:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            num_embeddings=5000,
            embedding_dim=32,
            feature_names=list(METHODS) if name == "tt" else [name],
            compression=compression,
        )
        for name, compression in CACHED.items()
    ]
    return EmbeddingBagCollection(tables=tables, device="cuda")


def attached(model: Model, kind: Any = torchrec.optim.RowWiseAdagrad) -> Model:
    apply_optimizer_in_backward(kind, model.ebc.parameters(), {"lr": 0.05})
    return model


def sharded(
    model: Model, dense: EmbeddingComputeKernel = EmbeddingComputeKernel.FUSED
) -> DistributedModelParallel:
    """The model on this rank; its uncompressed table cut by rows, or whole by another kernel."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    caching = dense is not EmbeddingComputeKernel.FUSED
    ways = {
        config.name: table_wise(rank=0, compute_kernel=dense.value)
        if config.name == "t_dense" and caching
        else (row_wise() if config.name in ("t_qr", "t_dense") else table_wise(rank=0))
        for config in model.ebc.embedding_bag_configs()
    }
    plan = construct_module_sharding_plan(
        model.ebc, ways, sharder=EmbeddingBagCollectionSharder(), local_size=1, world_size=1
    )
    made = DistributedModelParallel(
        model,
        device=torch.device("cuda", 0),
        plan=ShardingPlan({"ebc": plan}),
        # Without this fbgemm finds rows at places that the batch before has given to others.
        sharders=[
            EmbeddingBagCollectionSharder(fused_params={"prefetch_pipeline": True} if caching else None)
        ],
    )
    made.load_state_dict(state)
    return made


def optimizer_of(model: nn.Module) -> KeyedOptimizerWrapper:
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    return KeyedOptimizerWrapper(parameters, lambda own: torch.optim.SGD(own, lr=DENSE_LR))


def local_state(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, value in model.state_dict().items():
        whole = value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value
        found[name] = whole.detach().clone()
    return found


def plain(model: nn.Module, given: Sequence[KeyedJaggedTensor]) -> list[Tensor]:
    """The outputs of a plain loop's steps."""
    optimizer, outputs = optimizer_of(model), []
    for kjt in given:
        optimizer.zero_grad()
        loss, columns = model(kjt.to("cuda"))
        loss.backward()
        optimizer.step()
        outputs.append(columns.detach().clone())
    poll(wait=True)
    return outputs


def piped(
    kind: type[TrainPipelineSparseDist[Any, Any]],
    model: DistributedModelParallel,
    given: Sequence[KeyedJaggedTensor],
) -> tuple[list[Tensor], int]:
    """The outputs through a pipeline, and how many of its batches came to the look-up prepared."""
    prepared = []

    def noted(taken: Any, kjt: KeyedJaggedTensor) -> Any:
        bags = taken(kjt)
        prepared.append(bags is not None)
        return bags

    for kernel in model.module.ebc._kernels():
        kernel._taken = partial(noted, kernel._taken)
    runner, outputs = kind(model, optimizer_of(model), torch.device("cuda", 0)), []
    iterator = iter(given)
    for _ in given:
        outputs.append(runner.progress(iterator).detach().clone())
    torch.cuda.synchronize()
    poll(wait=True)
    return outputs, sum(prepared)


def on_host(seeds: int, same_shape: bool) -> list[KeyedJaggedTensor]:
    """Batches as a data loader with ``pin_memory`` hands them over; those of one shape become graphs."""
    made = [batch(seed).to("cpu") if same_shape else features(seed) for seed in range(seeds)]
    return [kjt.pin_memory() for kjt in made]


def test_a_rank_equals_the_unsharded_module() -> None:
    given = on_host(6 if IS_REAL else 4, same_shape=False)
    reference = attached(Model(uncached()), torch.optim.SGD)
    own = sharded(attached(Model(uncached()), torch.optim.SGD))
    for one, other in zip(plain(reference, given), plain(own, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    expected = local_state(reference)
    for name, value in local_state(own).items():
        # The uncompressed table is fbgemm's here; by it the linear layer's gradients differ in rounding.
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "same_shape"),
    [
        pytest.param(TrainPipelineSparseDist, False, marks=takes_minutes),
        pytest.param(TrainPipelineSparseDist, True, marks=takes_minutes),
        pytest.param(PrefetchTrainPipelineSparseDist, False, marks=takes_minutes),
        (PrefetchTrainPipelineSparseDist, True),
    ],
)
def test_pipelines_give_the_bits_of_the_plain_loop(
    kind: Any, same_shape: bool, groups_made: list[GraphedGroup], brought: list[bool]
) -> None:
    """torchrec's own, as they are: four streams, and the next batch prepared on one of them."""
    given = on_host(10, same_shape)
    loop, through = (sharded(attached(Model(uncached()))) for _ in range(2))
    expected = plain(loop, given)
    captured = sum(group.graphs for group in groups_made)
    outputs, prepared = piped(kind, through, given)
    assert (captured > 0) == same_shape
    assert (sum(group.graphs for group in groups_made) > captured) == same_shape
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))
    own, other = local_state(loop), local_state(through)
    assert [name for name in own if not torch.equal(own[name], other[name])] == []
    assert (prepared > 0) == (kind is PrefetchTrainPipelineSparseDist)
    assert (brought.count(True) >= 4) == (same_shape and kind is PrefetchTrainPipelineSparseDist)


@takes_minutes
@pytest.mark.parametrize("kind", PIPELINES)
def test_pipelines_over_cached_rows(kind: Any) -> None:
    given = on_host(10, same_shape=False)
    loop, through = (sharded(attached(Model(cached()), torch.optim.SGD)) for _ in range(2))
    expected = plain(loop, given)
    outputs, _ = piped(kind, through, given)
    for one, other in zip(expected, outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)  # write-backs sum with atomics
    mine, theirs = (model.module.ebc.cache_metrics()["t_tt"] for model in (loop, through))
    assert mine.promotions > 0
    assert mine.evictions > 0
    assert (mine.lookups, mine.hit_rate, mine.promotions) == (
        theirs.lookups,
        theirs.hit_rate,
        theirs.promotions,
    )


@needs_gpu
def test_rows_cached_by_fbgemm_beside_compressed_tables() -> None:
    """An uncompressed table in the host's memory, whose rows torchrec's pipeline asks for ahead."""
    given = on_host(6, same_shape=False)
    loop = sharded(attached(Model(uncached())))
    through = sharded(attached(Model(uncached())), EmbeddingComputeKernel.FUSED_UVM_CACHING)
    expected = plain(loop, given)
    outputs, prepared = piped(PrefetchTrainPipelineSparseDist, through, given)
    assert prepared > 0
    for one, other in zip(expected, outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    own, other = local_state(loop), local_state(through)
    for name in own:
        if "t_dense" not in name:  # whose rows may still be in fbgemm's cache
            torch.testing.assert_close(own[name], other[name], rtol=1e-3, atol=1e-5)
