"""torchrec's feature processors around a compressed collection: weights made once the ids have travelled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from recemb.errors import BatchError
from recemb.torchrec_io import get_sharders
from tests.sharding.cases import BATCH, KEYS, Model, attach, batch, collection, is_fused, joined, plan
from tests.sharding.places import Case
from tests.sharding.shared import Found, differences, sharded

PLACES = ("whole", "row_wise")


class Processed(nn.Module):
    """A collection whose bags are weighted by position."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        ebc = collection(case)
        self.names = sorted(ebc._embedding_names)
        # Bags have up to three ids.
        positions = PositionWeightedModuleCollection(dict.fromkeys(KEYS, 3))
        for at, parameter in enumerate(positions.parameters()):
            parameter.data = torch.linspace(0.5, 1.5 + at / 8, 3)
        self.fp = FeatureProcessedEmbeddingBagCollection(ebc, positions)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.columns(self.fp(features))

    def columns(self, pooled: Any) -> Tensor:
        return torch.cat([pooled[name] for name in self.names], dim=1)


def parity(rank: int, place: str) -> Found:
    """A step beside the unsharded module on the ranks' batches together, then a look-up prepared ahead."""
    case, bare = Case(place, "weighted", "sgd"), Case(place, "sum", "sgd")
    reference, inner = Processed(case), Processed(case)
    start = {key: value.clone() for key, value in reference.state_dict().items()}
    prefix = "fp._embedding_bag_collection."
    named = dict(reference.named_parameters())
    fused = [key for key in named if key.startswith(prefix) and is_fused(case, key)]
    attach(case, [named[key] for key in fused])
    collection_ = inner.fp._embedding_bag_collection
    attach(case, list(collection_.parameters()))
    model = DistributedModelParallel(
        inner,
        device=torch.device("cpu"),
        plan=ShardingPlan({"fp": plan(case, collection_)}),
        sharders=get_sharders(),
    )
    model.load_state_dict({key: value.clone() for key, value in start.items()})

    def local(step: int) -> list[KeyedJaggedTensor]:
        return [batch(10 * step + at, bare) for at in range(case.world)]

    rows = slice(rank * BATCH, (rank + 1) * BATCH)
    expected, own = reference(joined(local(0))), model(local(0)[rank])
    expected.square().mean().backward()
    own.square().mean().backward()
    state, after = model.state_dict(), reference.state_dict()
    outputs = float((own - expected[rows]).detach().abs().max())
    gradients = {
        key: float((parameter.grad - named[key].grad).abs().max())
        for key, parameter in model.named_parameters()
        if "position_weights" in key
    }
    weights = {key: by for key, by in differences(state, after).items() if key in fused}
    moved = {key: float((after[key] - start[key]).abs().max()) for key in fused}
    fp = model.module.fp
    ctx = fp.create_context()
    ids = fp.input_dist(ctx, local(1)[rank]).wait().wait()
    fp.prefetch(ctx=ctx, dist_input=ids)
    ahead = inner.columns(fp.compute_and_output_dist(ctx, ids).wait())
    return {
        "outputs": outputs,
        "gradients": gradients,
        "weights": weights,
        "moved": moved,
        "ahead": float((ahead - reference(joined(local(1)))[rows]).detach().abs().max()),
    }


def without_weights(rank: int) -> Found:
    """A weighted collection and a batch that has no weights, which nothing makes."""
    case = Case("whole", "weighted", "sgd")
    model = sharded(case, Model(collection(case)).state_dict())
    try:
        model(batch(rank, Case("whole", "sum", "sgd")))
    except BatchError as error:
        return {"message": str(error)}
    return {"message": ""}
