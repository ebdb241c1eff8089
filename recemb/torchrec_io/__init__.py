"""The torchrec face: the only package, with ``models``, that imports torchrec.

The names below load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from recemb.stack import check_stack

if TYPE_CHECKING:
    from recemb.torchrec_io.planning.plan_file import load_plan
    from recemb.torchrec_io.planning.planner import planner
    from recemb.torchrec_io.sharding.module import ShardedEmbeddingBagCollection
    from recemb.torchrec_io.sharding.sharder import EmbeddingBagCollectionSharder, get_sharders

check_stack()

_HOME = {
    "EmbeddingBagCollectionSharder": "recemb.torchrec_io.sharding.sharder",
    "ShardedEmbeddingBagCollection": "recemb.torchrec_io.sharding.module",
    "get_sharders": "recemb.torchrec_io.sharding.sharder",
    "load_plan": "recemb.torchrec_io.planning.plan_file",
    "planner": "recemb.torchrec_io.planning.planner",
}

__all__ = [
    "EmbeddingBagCollectionSharder",
    "ShardedEmbeddingBagCollection",
    "get_sharders",
    "load_plan",
    "planner",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
