"""What is said of a collection that is whole on every rank: a warning, or an error if it has cached rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from recemb.backends.base import Backend
from recemb.cache.refresh import is_frozen
from recemb.cache.replicas import ddp_around
from recemb.errors import ConfigError


def warn_of_replication(collection: nn.Module) -> bool:
    """Warn, on the first rank, where torchrec's DistributedModelParallel did not shard a collection.

    torchrec looks sharders up by a module's exact type. It tells no module that it has found none, and
    replicates that by DistributedDataParallel, having left on the model what is not to be replicated. A model
    that a user wraps in DistributedDataParallel, who wants replicas then, does not have that.

    Called in a look-up: only there torch says which DistributedDataParallel it runs under.

    Returns:
        whether the question is settled.
    """
    around = ddp_around()
    if around is None:
        return False
    left = getattr(around.module, "_ddp_params_and_buffers_to_ignore", None)
    if left is None or dist.get_world_size(around.process_group) == 1:
        return True
    path = next((name for name, module in around.module.named_modules() if module is collection), None)
    if path is None:
        return False
    prefix = f"{path}." if path else ""
    replicated = [name for name, _ in collection.named_parameters() if prefix + name not in left]
    if replicated and dist.get_rank(around.process_group) == 0:
        module = f"its module {path!r}" if path else "its module, an EmbeddingBagCollection,"
        warnings.warn(
            f"DistributedModelParallel did not shard {module}: every rank holds all of its tables, "
            "uncompressed ones too, and exchanges gradients of their size. Give it recemb's sharders, "
            "DistributedModelParallel(..., sharders=recemb.torchrec_io.get_sharders()), and a plan that has "
            "the module; tables that are to be replicated are planned data_parallel()",
            stacklevel=3,
        )
    return True


def refuse_to_drift(tables: Sequence[Backend]) -> None:
    """Refuse cached tables of which each rank would exchange other rows than the rest.

    A cache exchanges rows by what its rank has looked up, while gradients are averaged slot by slot. Where
    DistributedDataParallel broadcasts buffers, all ranks have the first one's cache.

    Called in each look-up: only there torch says which DistributedDataParallel it runs under.

    Args:
        tables: cached ones.

    Raises:
        ConfigError: one that trains is on several ranks, and buffers are not broadcast. Nothing has changed.
    """
    around = ddp_around()
    if around is None or around.broadcast_buffers:
        return
    training = [table for table in tables if not is_frozen(table)]
    ranks = dist.get_world_size(around.process_group)
    if training and ranks > 1:
        raise ConfigError(
            f"table {training[0].table.name!r}: its cached rows, cache=HotRows(...), would be others on each "
            f"of the {ranks} ranks, whose gradients are averaged: the ranks' tables would drift apart. Shard "
            "the collection, DistributedModelParallel(..., sharders=recemb.torchrec_io.get_sharders()), with "
            "a plan that has the module; or give every rank the cache of the first, "
            "DistributedDataParallel(..., broadcast_buffers=True)"
        )
