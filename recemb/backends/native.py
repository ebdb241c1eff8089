"""The way from a group of backends to a native kernel, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.optim import fused_update
from recemb_kernels.gather_op import GatherOp
from recemb_kernels.native import attempt

_B = TypeVar("_B", bound=Backend)


def owner_of(table: _B) -> _B:
    """The table that holds the storage of ``table``: itself for most."""
    return table._owner[0] if table._owner else table  # type: ignore[return-value] # peers are of one method


def pooled_native(
    op: GatherOp[Any],
    tables: Sequence[_B],
    bags: Bags,
    parameters: Callable[[_B], Sequence[nn.Parameter]],
    encode: Callable[[Sequence[_B]], tuple[int, ...]],
    *,
    fused_only: bool = False,
) -> Tensor | None:
    """Pool F features in one call of ``op``, [B, sum of the widths], or ``None`` where it does not run.

    A storage that serves several features, or several tables, is passed once, so that it is updated once.

    Args:
        op: the kernel.
        tables: ``tables[f]`` for feature f.
        bags: F features.
        parameters: what the kernel reads of one table.
        encode: the kernel's code of the distinct storages, given by the tables that own them.
        fused_only: leave it to plain torch unless an optimizer is fused.
    """
    owners = list(dict.fromkeys(owner_of(table) for table in tables))
    stores = [parameter for owner in owners for parameter in parameters(owner)]
    if not all(store.dtype == torch.float32 and store.device.type == "cpu" for store in stores):
        return None
    update = fused_update(stores) if torch.is_grad_enabled() else None
    if fused_only and update is None:
        return None
    index = {owner: k for k, owner in enumerate(owners)}
    features = tuple(
        x
        for table in tables
        for x in (index[owner_of(table)], int(table.table.pooling == "mean"), table.key_base)
    )
    weights = None if bags.weights is None else bags.weights.float()
    return attempt(
        op.name,
        lambda: op(
            stores, bags.ids, bags.offsets, weights, bags.batch_size, (encode(owners), features), update
        ),
    )
