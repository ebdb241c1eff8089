"""torchrec's own modules around recemb's collection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.feature_processor_ import PositionWeightedModule, PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import recemb
from recemb.spec import Compression

METHODS: list[Compression] = [
    recemb.Dense(),
    recemb.TensorTrain(rank=2),
    recemb.QuotientRemainder(collisions=4),
    recemb.ROBE(compress_rate=2, block_size=4),
    recemb.MixedDimension(dim=2),
]
by_method = pytest.mark.parametrize("compression", METHODS, ids=lambda c: c.method)


def collection(compression: Compression, is_weighted: bool = False) -> recemb.EmbeddingBagCollection:
    return recemb.EmbeddingBagCollection(
        tables=[
            recemb.EmbeddingBagConfig(
                name=f"t{k}",
                num_embeddings=30 + k,
                embedding_dim=8,
                feature_names=[f"f{k}"],
                compression=compression,
            )
            for k in range(3)
        ],
        is_weighted=is_weighted,
    )


def batch(weights: torch.Tensor | None = None) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=["f0", "f1", "f2"],
        values=torch.tensor([0, 29, 3, 3, 8, 7, 1, 2, 3, 31]),
        lengths=torch.tensor([2, 1, 0, 1, 3, 3]),
        weights=weights,
    )


@by_method
def test_feature_processed_collection(compression: Compression) -> None:
    ebc = collection(compression, is_weighted=True)
    processors = PositionWeightedModuleCollection({f"f{k}": 5 for k in range(3)})
    with torch.no_grad():
        for k in range(3):
            processors.position_weights[f"f{k}"].copy_(torch.arange(1.0, 6.0) * (k + 1))
    module = FeatureProcessedEmbeddingBagCollection(ebc, processors)
    output = module(batch())
    # Position p of feature k weighs (p + 1) * (k + 1).
    weights = torch.tensor([1.0, 2, 1, 2, 3, 6, 9, 3, 6, 9])
    torch.testing.assert_close(output.values(), ebc(batch(weights)).values())
    output.values().square().sum().backward()
    for k in range(3):
        gradient = processors.position_weights[f"f{k}"].grad
        assert gradient is not None
        assert gradient.any()
    assert all(p.grad is not None for p in ebc.parameters())


@by_method
def test_feature_processors_by_feature(compression: Compression) -> None:
    ebc = collection(compression, is_weighted=True)
    module = FeatureProcessedEmbeddingBagCollection(
        ebc, {f"f{k}": PositionWeightedModule(max_feature_length=5) for k in range(3)}
    )
    torch.testing.assert_close(module(batch()).values(), ebc(batch(torch.ones(10))).values())


@by_method
def test_torchrecs_dlrm_trains(compression: Compression) -> None:
    model = DLRMTrain(
        DLRM(
            embedding_bag_collection=collection(compression),
            dense_in_features=4,
            dense_arch_layer_sizes=[16, 8],
            over_arch_layer_sizes=[8, 1],
        )
    )
    clicks = Batch(dense_features=torch.randn(2, 4), sparse_features=batch(), labels=torch.tensor([0.0, 1.0]))
    embeddings = model.model.sparse_arch.embedding_bag_collection
    before = {name: p.detach().clone() for name, p in embeddings.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss, _ = model(clicks)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in embeddings.named_parameters())


@by_method
def test_torch_compile_keeps_the_look_up_and_its_fused_optimizer(compression: Compression) -> None:
    torch.manual_seed(0)
    eager, compiled = collection(compression), collection(compression)
    compiled.load_state_dict(eager.state_dict())
    for module in (eager, compiled):
        apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})

    def loss(module: recemb.EmbeddingBagCollection, features: KeyedJaggedTensor) -> torch.Tensor:
        return module(features).values().square().sum()

    step = torch.compile(loss, backend="aot_eager")
    for _ in range(2):
        first, second = loss(eager, batch()), step(compiled, batch())
        assert torch.equal(first, second)
        first.backward()
        second.backward()
    for ours, theirs in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_uncompressed_bits_are_torchs_without_gradients_too(pooling: str) -> None:
    torch.manual_seed(0)
    module = recemb.EmbeddingBagCollection(
        tables=[
            recemb.EmbeddingBagConfig(
                name="t",
                num_embeddings=50,
                embedding_dim=24,
                feature_names=["f"],
                pooling=PoolingType[pooling.upper()],
            )
        ]
    )
    lengths = torch.randint(0, 9, (200,))
    ids = torch.randint(0, 50, (int(lengths.sum()),))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    (weight,) = module.parameters()
    with torch.no_grad():
        ours = module(KeyedJaggedTensor(keys=["f"], values=ids, lengths=lengths)).values()
        theirs = F.embedding_bag(ids, weight, offsets, mode=pooling, include_last_offset=True)
    assert torch.equal(ours, theirs)
