"""The way from backends to the native kernels: one call for all tables, whatever their methods."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from recemb.bags import Bags
from recemb.errors import NonFiniteError
from recemb.optim import FusedUpdate
from recemb_kernels.lookup import Lookup
from recemb_kernels.native import attempt

if TYPE_CHECKING:
    from recemb.backends.base import Backend

_B = TypeVar("_B", bound="Backend")


def owner_of(table: _B) -> _B:
    """The table that holds the storage of ``table``: itself for most."""
    return table._owner[0] if table._owner else table  # type: ignore[return-value] # peers are of one method


def pooled_native(tables: Sequence[Backend], bags: Bags) -> Tensor | None:
    """Pool F features in one call, [B, sum of D], or ``None`` where plain torch has to do it.

    A storage that serves several features, or several tables, is passed once, so that it is updated once.
    Each table takes the step of its own in-backward optimizer, or gets gradients when it has none.

    Args:
        tables: ``tables[f]`` for feature f, of any methods; of one method under torch.compile.
        bags: F features.

    Raises:
        NonFiniteError: in the backward of a fused update, before any weight changes.
    """
    owners, fused, lookup = _prepare(tables)
    if lookup is None:
        return None
    # own_parameters() walks the module tree, which costs more than the kernel at B = 64.
    stores = [[store for store in owner._parameters.values() if store is not None] for owner in owners]
    # A fused update writes to the parameters: copies that are contiguous would take it in their place.
    if not all(
        store.is_cpu and store.dtype is torch.float32 and store.is_contiguous()
        for own in stores
        for store in own
    ):
        return None
    compiling, training = torch.compiler.is_compiling(), torch.is_grad_enabled()
    ask = training and not compiling
    updates = [update.of(own) if ask else None for update, own in zip(fused, stores, strict=True)]
    if training and any(
        owner.native_when_fused and update is None for owner, update in zip(owners, updates, strict=True)
    ):
        return None
    weights = None if bags.weights is None else bags.weights.float()
    if compiling:
        if len({table.op.name for table in lookup.tables}) > 1:
            return None
        return attempt(
            lookup.tables[0].op.name,
            lambda: lookup.compiled(stores, bags.ids, bags.offsets, weights, bags.batch_size),
        )
    return attempt(
        lookup.tables[0].op.name,
        lambda: lookup(stores, bags.ids, bags.offsets, weights, bags.batch_size, updates),
    )


def _prepare(tables: Sequence[Backend]) -> tuple[list[Backend], list[FusedUpdate], Lookup | None]:
    """The storages of a group, their updates and its look-up; remembered by the group's first table."""
    key, memo = tuple(tables), tables[0].memo
    compiling = torch.compiler.is_compiling()
    if not compiling and key in memo:
        known: tuple[list[Backend], list[FusedUpdate], Lookup | None] = memo[key]
        return known
    owners = list(dict.fromkeys(owner_of(table) for table in tables))
    index = {owner: k for k, owner in enumerate(owners)}
    features = tuple(
        x
        for table in tables
        for x in (index[owner_of(table)], int(table.table.pooling == "mean"), table.key_base)
    )
    shapes = [owner.native_shape() for owner in owners]
    whole = tuple(shape for shape in shapes if shape is not None)
    refusal = partial(_refusal, [table.table.name for table in tables])
    lookup = Lookup(whole, features, refusal) if len(whole) == len(shapes) else None
    found = owners, [FusedUpdate() for _ in owners], lookup
    if not compiling:
        memo[key] = found
    return found


def _refusal(names: Sequence[str]) -> NonFiniteError:
    shown = ", ".join(dict.fromkeys(names[:5])) + (", ..." if len(names) > 5 else "")
    return NonFiniteError(
        f"the gradient of the pooled rows of tables {shown} is NaN or infinite; none of their weights was "
        "changed. Lower the learning rate, or look for infinite inputs or losses in this batch"
    )
