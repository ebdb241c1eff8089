"""Small models for the planner."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.planner.types import Topology

from recemb.planner.costs import default_costs
from recemb.spec import (
    ROBE,
    Compression,
    Dense,
    HotRows,
    MixedDimension,
    QuotientRemainder,
    TableSpec,
    TensorTrain,
)
from recemb.torchrec_io.configs import to_configs
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection
from recemb.torchrec_io.planning.planner import topology

GB = 10**9
MIXED: dict[str, Compression] = {
    "big": Dense(),
    "tt": TensorTrain(rank=8),
    "qr": QuotientRemainder(collisions=40),
    "md": MixedDimension(dim=4),
    "robe_a": ROBE(compress_rate=50, block_size=8),
    "robe_b": ROBE(compress_rate=50, block_size=8),
    "small": Dense(),
}
# One of two tables that share an array has a cache.
CACHED: dict[str, Compression] = {
    "hot_tt": TensorTrain(rank=8, cache=HotRows(rows=70)),
    "hot_robe": ROBE(compress_rate=50, block_size=8, group="hot", cache=HotRows(fraction=0.1)),
    "robe_c": ROBE(compress_rate=50, block_size=8, group="hot"),
}
ROWS = {"big": 50_000, "tt": 40_000, "qr": 9_000, "md": 7_000, "robe_a": 5_000, "robe_b": 3_000, "small": 30}


class Model(nn.Module):
    """A collection at ``ebc``."""

    def __init__(self, compressions: dict[str, Compression], device: str = "meta") -> None:
        super().__init__()
        self.tables = [
            TableSpec(
                name=name, num_embeddings=ROWS.get(name, 1000), embedding_dim=16, compression=compression
            )
            for name, compression in compressions.items()
        ]
        self.ebc = EmbeddingBagCollection(tables=to_configs(self.tables), device=torch.device(device))


def ranks(world: int = 4, local: int = 2, device: str = "cuda", hbm: int = GB, ddr: int = GB) -> Topology:
    """A small cluster."""
    return topology(world, default_costs(device), local, hbm, ddr)
