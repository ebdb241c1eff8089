"""The torchrec face: the only package, with ``models``, that imports torchrec.

The names below load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from recemb.stack import check_stack

if TYPE_CHECKING:
    from recemb.torchrec_io.inference.collection import QuantEmbeddingBagCollection
    from recemb.torchrec_io.inference.quantize import quantize_embeddings
    from recemb.torchrec_io.inference.shard import shard_quant_model
    from recemb.torchrec_io.planning.plan_file import load_plan
    from recemb.torchrec_io.planning.planner import planner
    from recemb.torchrec_io.sharding.module import ShardedEmbeddingBagCollection
    from recemb.torchrec_io.sharding.sharder import EmbeddingBagCollectionSharder, get_sharders

check_stack()

_HOME = {
    "EmbeddingBagCollectionSharder": "recemb.torchrec_io.sharding.sharder",
    "QuantEmbeddingBagCollection": "recemb.torchrec_io.inference.collection",
    "ShardedEmbeddingBagCollection": "recemb.torchrec_io.sharding.module",
    "get_sharders": "recemb.torchrec_io.sharding.sharder",
    "quantize_embeddings": "recemb.torchrec_io.inference.quantize",
    "shard_quant_model": "recemb.torchrec_io.inference.shard",
    "load_plan": "recemb.torchrec_io.planning.plan_file",
    "planner": "recemb.torchrec_io.planning.planner",
}

__all__ = [
    "EmbeddingBagCollectionSharder",
    "QuantEmbeddingBagCollection",
    "ShardedEmbeddingBagCollection",
    "get_sharders",
    "load_plan",
    "planner",
    "quantize_embeddings",
    "shard_quant_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
