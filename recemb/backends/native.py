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

    A table that serves several features is passed once, so that its rows are updated once.

    Args:
        op: the kernel.
        tables: ``tables[f]`` for feature f.
        bags: F features.
        parameters: what the kernel reads of one table.
        encode: the kernel's code of the distinct tables.
        fused_only: leave it to plain torch unless an optimizer is fused.
    """
    distinct = list(dict.fromkeys(tables))
    stores = [parameter for table in distinct for parameter in parameters(table)]
    if not all(store.dtype == torch.float32 and store.device.type == "cpu" for store in stores):
        return None
    update = fused_update(stores) if torch.is_grad_enabled() else None
    if fused_only and update is None:
        return None
    index = {table: t for t, table in enumerate(distinct)}
    features = tuple(x for table in tables for x in (index[table], int(table.table.pooling == "mean")))
    weights = None if bags.weights is None else bags.weights.float()
    return attempt(
        op.name,
        lambda: op(
            stores, bags.ids, bags.offsets, weights, bags.batch_size, (encode(distinct), features), update
        ),
    )
