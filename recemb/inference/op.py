"""The engine as torch ops, for torch.export: one node looks up all tables of a collection, ids checked.

::

    recemb::check_bags(Tensor ids, Tensor offsets, Tensor? weights, str tables) -> Tensor
    recemb::embedding_bags(Tensor[] stored, Tensor ids, Tensor offsets, Tensor? weights, str tables) -> Tensor

``tables`` is :class:`recemb.inference.description.Description` as text. The first gives a copy of the ids, of
which all later look-ups are made: no pass over the graph can drop the check or move a look-up before it. The
second gives [B, sum of D]. Exported programs are for inference: the ops have no gradients.

Importing this module registers both. A process that loads an exported program needs nothing else of recemb,
and nothing of torchrec.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn

from recemb.backends import build
from recemb.backends.base import Backend
from recemb.bags import Bags, LookupTarget, LookupTargets, check_bags, check_structure
from recemb.engine import Engine
from recemb.errors import BatchError
from recemb.inference.description import Description
from recemb.inference.table import build_quantized

# torch.library is untyped.
_LIBRARY = cast(Any, torch.library).Library("recemb", "FRAGMENT")
_BATCH = "Tensor ids, Tensor offsets, Tensor? weights, str tables"
# Programs whose tables are kept ready; each holds on to its weights.
_READY = 16


class _Program:
    """Tables of one call, their weights in place."""

    def __init__(self, description: Description, stored: Sequence[Tensor]) -> None:
        meta = torch.device("meta")
        tables: Mapping[str, Backend] = (
            build_quantized(description.tables, description.kinds, meta)
            if description.kinds
            else build(description.tables, meta)
        )
        at = iter(stored)
        for table in tables.values():
            for module in _modules_of(table):
                for name in module._parameters:
                    module._parameters[name] = nn.Parameter(next(at).detach(), requires_grad=False)
            if table.cache is not None:
                table.cache.ids = next(at).detach()
        self.tables, self.engine = tables, Engine(description.tables)
        keys = description.keys
        self.features = [keys.index(target.feature) for target in self.engine.targets]

    def __call__(self, bags: Bags) -> Tensor:
        own = bags.select(self.features)
        own.checked = True
        with torch.no_grad():
            return self.engine(self.tables, own)


def _modules_of(table: Backend) -> list[nn.Module]:
    """What holds stored tensors of a table, in the order of :func:`stored_tensors`."""
    return [table] if table.cache is None else [table, table.cache]


def stored_tensors(tables: Sequence[Backend]) -> list[Tensor]:
    """The ``stored`` of an op: every table's parameters, then its cached rows and their ids."""
    found: list[Tensor] = []
    for table in tables:
        for module in _modules_of(table):
            found += [parameter for parameter in module._parameters.values() if parameter is not None]
        if table.cache is not None:
            found.append(table.cache.ids)
    return found


_programs: OrderedDict[tuple[object, ...], _Program] = OrderedDict()
_lock = Lock()


def _program(tables: str, stored: Sequence[Tensor]) -> _Program:
    # A program holds its weights, so that no other tensor can come to lie where they do.
    key = (tables, *[tensor.data_ptr() for tensor in stored])
    with _lock:
        known = _programs.get(key)
        if known is None:
            known = _programs[key] = _Program(_description(tables), stored)
            while len(_programs) > _READY:
                _programs.popitem(last=False)
        _programs.move_to_end(key)
    return known


@lru_cache(maxsize=256)
def _description(tables: str) -> Description:
    return Description.from_text(tables)


@lru_cache(maxsize=256)
def _targets(tables: str) -> tuple[LookupTargets, LookupTargets, list[int]]:
    """Those of the keys, those of the look-ups, and where these are among the keys."""
    description = _description(tables)
    owner = {feature: LookupTarget(feature, table, rows) for feature, table, rows in description.checked}
    keys = LookupTargets(owner.get(key, LookupTarget(key, "none", 0)) for key in description.keys)
    every = LookupTargets(LookupTarget(*checked) for checked in description.checked)
    return keys, every, [description.keys.index(target.feature) for target in every]


def _bags(ids: Tensor, offsets: Tensor, weights: Tensor | None, tables: str) -> Bags:
    return Bags(ids.contiguous(), offsets.contiguous(), len(_description(tables).keys), weights)


def _check(ids: Tensor, offsets: Tensor, weights: Tensor | None, tables: str) -> Tensor:
    bags = _bags(ids, offsets, weights, tables)
    keys, every, positions = _targets(tables)
    check_structure(bags, keys)
    check_bags(bags.select(positions), every)
    return ids.clone()


def _look_up(
    stored: list[Tensor], ids: Tensor, offsets: Tensor, weights: Tensor | None, tables: str
) -> Tensor:
    if stored and stored[0].device != ids.device:
        raise BatchError(
            f"the batch is on {ids.device} and the tables on {stored[0].device}; move the batch there"
        )
    return _program(tables, stored)(_bags(ids, offsets, weights, tables)).float()


def _fake_look_up(
    stored: list[Tensor], ids: Tensor, offsets: Tensor, weights: Tensor | None, tables: str
) -> Tensor:
    description = _description(tables)
    columns = sum(table.embedding_dim * len(table.feature_names) for table in description.tables)
    size = (offsets.shape[0] - 1) // len(description.keys)
    return ids.new_empty(size, columns, dtype=torch.float32)


def _fake_check(ids: Tensor, offsets: Tensor, weights: Tensor | None, tables: str) -> Tensor:
    return torch.empty_like(ids)


for _name, _schema, _run, _fake in (
    ("check_bags", f"({_BATCH}) -> Tensor", _check, _fake_check),
    ("embedding_bags", f"(Tensor[] stored, {_BATCH}) -> Tensor", _look_up, _fake_look_up),
):
    _LIBRARY.define(_name + _schema)
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _run, _device)
    torch.library.register_fake(f"recemb::{_name}", _fake, lib=_LIBRARY)

checked_ids = torch.ops.recemb.check_bags
look_up = torch.ops.recemb.embedding_bags
