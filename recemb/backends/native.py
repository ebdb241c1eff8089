"""The way from a group of backends to a native kernel, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.errors import NonFiniteError
from recemb.optim import fused_update
from recemb_kernels.gather_op import Code, GatherOp
from recemb_kernels.native import attempt

_B = TypeVar("_B", bound=Backend)


def owner_of(table: _B) -> _B:
    """The table that holds the storage of ``table``: itself for most."""
    return table._owner[0] if table._owner else table  # type: ignore[return-value] # peers are of one method


def pooled_native(
    op: GatherOp[Any],
    tables: Sequence[_B],
    bags: Bags,
    encode: Callable[[Sequence[_B]], tuple[int, ...] | None],
    *,
    fused_only: bool = False,
) -> Tensor | None:
    """Pool F features in one call of ``op``, [B, sum of the widths], or ``None`` where it does not run.

    A storage that serves several features, or several tables, is passed once, so that it is updated once.

    Args:
        op: the kernel.
        tables: ``tables[f]`` for feature f.
        bags: F features.
        encode: the kernel's code of the distinct storages, given by the tables that own them, whose
            parameters go to the kernel in the order of ``param_shapes``; ``None`` when it has none for them.
        fused_only: leave training to plain torch unless an optimizer is fused.

    Raises:
        NonFiniteError: in the backward of a fused update, before any weight changes.
    """
    owners, code = _prepare(op, tables, encode)
    if code is None:
        return None
    # own_parameters() walks the module tree, which costs more than the kernel at B = 64.
    stores = [store for owner in owners for store in owner._parameters.values() if store is not None]
    if not all(store.is_cpu and store.dtype is torch.float32 for store in stores):
        return None
    training = torch.is_grad_enabled()
    update = fused_update(stores) if training else None
    if fused_only and training and update is None:
        return None
    weights = None if bags.weights is None else bags.weights.float()
    return attempt(
        op.name, lambda: op(stores, bags.ids, bags.offsets, weights, bags.batch_size, code, update)
    )


def _prepare(
    op: GatherOp[Any], tables: Sequence[_B], encode: Callable[[Sequence[_B]], tuple[int, ...] | None]
) -> tuple[list[_B], Code | None]:
    """The storages of a group and its code; remembered by the group's first table."""
    key, memo = tuple(tables), tables[0].memo
    if key in memo and not torch.compiler.is_compiling():
        owners, code = memo[key]
        return owners, code
    owners = list(dict.fromkeys(owner_of(table) for table in tables))
    index = {owner: k for k, owner in enumerate(owners)}
    features = tuple(
        x
        for table in tables
        for x in (index[owner_of(table)], int(table.table.pooling == "mean"), table.key_base)
    )
    shapes = encode(owners)
    names = [table.table.name for table in tables]
    code = None if shapes is None else Code(shapes, features, partial(_refusal, names))
    if not torch.compiler.is_compiling():
        memo[key] = owners, code
    return owners, code


def _refusal(names: Sequence[str]) -> NonFiniteError:
    shown = ", ".join(dict.fromkeys(names[:5])) + (", ..." if len(names) > 5 else "")
    return NonFiniteError(
        f"the gradient of the pooled rows of tables {shown} is NaN or infinite; none of their weights was "
        "changed. Lower the learning rate, or look for infinite inputs or losses in this batch"
    )
