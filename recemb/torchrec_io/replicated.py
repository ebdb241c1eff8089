"""The warning of a collection that ``DistributedModelParallel`` has left whole on every rank."""

from __future__ import annotations

import warnings

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def warn_of_replication(collection: nn.Module) -> bool:
    """Warn, on the first rank, where torchrec's DistributedModelParallel did not shard a collection.

    torchrec looks sharders up by a module's exact type. It tells no module that it has found none, and
    replicates that by DistributedDataParallel, having left on the model what is not to be replicated. A model
    that a user wraps in DistributedDataParallel, who wants replicas then, does not have that.

    Called in a look-up: only there torch says which DistributedDataParallel it runs under.

    Returns:
        whether the question is settled.
    """
    # torch leaves this one untyped.
    around = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
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
