"""Fused optimizer steps on the device, one launch per kind, by rates that the host works out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from recemb_kernels.triton_frame.elements import cdiv
from recemb_kernels.triton_frame.family import Backward, Family
from recemb_kernels.triton_frame.kernels import locate, scatter_rows, update_rows
from recemb_kernels.triton_frame.launches import locate_constants, scatter_constants, update_constants
from recemb_kernels.update import Kind, Update, is_stepped


@dataclass(frozen=True, eq=False)
class Entries:
    """Rows of one parameter of every table of a family, whose gradients lie in one array.

    Attributes:
        table: [E] place of the table in the family.
        row: [E] row of its parameter.
        touched: [E] int32, 0 where there is no gradient.
        cuts: [2] first entry, and one past the last.
        most: how many there can be.
    """

    table: Tensor
    row: Tensor
    touched: Tensor
    cuts: Tensor
    most: int


@dataclass(frozen=True, eq=False)
class TableKeys:
    """Keys that number the rows of one parameter over all tables of a family.

    Attributes:
        first: [tables + 1] each table's first key, counted from 0.
        total: the last of them.
    """

    first: Tensor
    total: int

    @classmethod
    def of(cls, family: Family[Any], rows: Sequence[int]) -> TableKeys:
        """From the rows of each table."""
        return cls(family.constant([0, *accumulate(rows)]), sum(rows))


def located(
    family: Family[Any], keys: TableKeys, key: Tensor, cuts: Tensor, base: Tensor | None = None
) -> Entries:
    """Entries for distinct keys.

    Args:
        keys: how they are numbered.
        key: [L], those from ``cuts[0]`` to ``cuts[1]`` counted from ``base[0]``, or from 0.
    """
    table, row = torch.empty(2, len(key), dtype=torch.int64, device=key.device)
    touched = torch.empty(len(key), dtype=torch.int32, device=key.device)
    num_tables = len(family.shapes)
    constants = locate_constants(num_tables)
    locate[(cdiv(len(key), constants["BR"]),)](
        table,
        row,
        touched,
        key,
        cuts,
        keys.first if base is None else base,
        keys.first,
        num_tables,
        len(key),
        **constants,
    )
    return Entries(table, row, touched, cuts, min(len(key), keys.total))


def rates_of(updates: Sequence[Update | None], number: int) -> list[list[list[float]]]:
    """What :func:`update_rows` reads of each step, whose number is counted here; ``hyper_at`` of
    ``recemb_optim.h``.

    Args:
        updates: per table.
        number: parameters of a table.

    Returns:
        [parameters, tables, 7]: rate, epsilon, both betas with their complements, and the root of Adam's
        second correction; zeros of what is not stepped.
    """
    return [
        [
            _rates(update, k) if is_stepped(update, k) and update is not None else [0.0] * 7
            for update in updates
        ]
        for k in range(number)
    ]


def _rates(update: Update, which: int) -> list[float]:
    number = 1.0
    if update.steps and (counter := update.steps[which]) is not None:
        counter.add_(1)
        number = float(counter)
    lr, root = update.lr, 1.0
    if update.kind in (Kind.ADAGRAD, Kind.ROWWISE_ADAGRAD):
        lr /= 1 + (number - 1) * update.lr_decay
    if update.kind == Kind.ADAM:
        lr /= 1 - update.beta1**number
        root = math.sqrt(1 - update.beta2**number)
    return [lr, update.eps, update.beta1, 1 - update.beta1, update.beta2, 1 - update.beta2, root]


def step(
    family: Family[Any],
    entries: Entries,
    grad: Tensor,
    parameters: Sequence[Tensor],
    asked: Backward,
    which: int,
) -> None:
    """Step on parameter ``which`` of every table whose update steps on it, unless the batch is refused.

    Args:
        grad: [E, W] float32.
        parameters: that parameter of each table, [rows, W].
    """
    updates = asked.updates
    groups: dict[tuple[Kind, torch.dtype | None], list[int]] = {}
    for table, update in enumerate(updates):
        if update is not None and is_stepped(update, which):
            state = update.state[which] if update.state else None
            groups.setdefault((update.kind, None if state is None else state.dtype), []).append(table)
    everyone = sum(map(len, groups.values())) == len(updates)
    for (kind, dtype), tables in groups.items():
        touched = entries.touched
        if len(groups) > 1 or not everyone:
            members = [int(table in tables) for table in range(len(updates))]
            chosen = family.remembered(tuple(members))[entries.table.clamp(min=0)]
            touched = touched * chosen.to(touched.dtype)
        # Tables without this update are not read: any address does for them.
        owners = [table if table in tables else tables[0] for table in range(len(updates))]
        states, states2 = (
            [getattr(updates[owner], name) for owner in owners] for name in ("state", "state2")
        )
        own = family.addresses([parameters[owner] for owner in owners])
        first = family.addresses([s[which] for s in states]) if dtype else own
        constants = update_constants(kind, parameters[0].shape[1], family.dtype, dtype)
        update_rows[(cdiv(entries.most, constants["BE"]),)](
            grad,
            entries.table,
            entries.row,
            touched,
            asked.refused,
            own,
            first,
            family.addresses([s[which] for s in states2]) if kind == Kind.ADAM else first,
            entries.cuts,
            asked.rates[which],
            **constants,
        )


def finish(
    family: Family[Any],
    entries: Entries,
    grad: Tensor,
    parameters: Sequence[Tensor],
    asked: Backward,
    which: int,
) -> list[Tensor | None]:
    """Step on parameter ``which`` of the tables with an update; the dense gradients of others if wanted.

    Args:
        grad: [E, W] float32.
        parameters: all of the family's, table by table.
    """
    number = len(parameters) // len(asked.updates)
    own = parameters[which::number]
    if any(update is not None for update in asked.updates):
        step(family, entries, grad, own, asked, which)
    wanted = [asked.writes(t, which, number) for t in range(len(own))]
    if not any(wanted):
        return [None] * len(own)
    rows = [len(parameter) if want else 0 for parameter, want in zip(own, wanted, strict=True)]
    first = [0, *accumulate(rows)]
    width = grad.shape[1]
    dense = torch.zeros(first[-1], width, dtype=family.dtype, device=family.device)
    constants = scatter_constants(width)
    scatter_rows[(entries.most, cdiv(width, constants["BW"]))](
        dense,
        grad,
        entries.table,
        entries.row,
        entries.touched,
        entries.cuts,
        family.remembered(tuple(at if want else -1 for at, want in zip(first, wanted, strict=False))),
        **constants,
    )
    return [
        dense[at : at + size] if want else None for at, size, want in zip(first, rows, wanted, strict=False)
    ]
