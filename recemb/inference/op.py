"""The engine as torch ops, for torch.export: one node looks up all tables of a collection, ids checked.

::

    recemb::check_bags(Tensor ids, Tensor offsets, Tensor? weights, str tables) -> Tensor
    recemb::embedding_bags(Tensor[] stored, Tensor ids, Tensor offsets, Tensor? weights, str tables) -> Tensor

``tables`` is :class:`recemb.inference.description.Description` as text. The first gives a copy of the ids, of
which all later look-ups are made: no pass over the graph can drop the check or move a look-up before it. The
second gives [B, sum of D]. Exported programs are for inference: going back through them is an error.

Importing this module registers both. A process that loads an exported program needs nothing else of recemb,
and nothing of torchrec.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from recemb.backends import build
from recemb.backends.base import Backend
from recemb.bags import Bags, LookupTarget, LookupTargets, check_bags, check_structure
from recemb.engine import Engine
from recemb.errors import BatchError, ConfigError
from recemb.inference.description import Description
from recemb.inference.table import build_quantized

# torch.library is untyped.
_LIBRARY = cast(Any, torch.library).Library("recemb", "FRAGMENT")
_BATCH = "Tensor ids, Tensor offsets, Tensor? weights, str tables"


class _Program:
    """Tables on meta, which have their weights for as long as a call takes."""

    def __init__(self, description: Description) -> None:
        meta = torch.device("meta")
        tables: Mapping[str, Backend] = (
            build_quantized(description.tables, description.kinds, meta)
            if description.kinds
            else build(description.tables, meta)
        )
        self.tables, self.engine = tables, Engine(description.tables)
        self.places = [place for table in tables.values() for place in _places_of(table)]
        self.empty = [values[name] for values, name in self.places]
        self.layouts = [(tensor.shape, tensor.dtype) for tensor in self.empty]
        keys = description.keys
        self.features = [keys.index(target.feature) for target in self.engine.targets]

    def __call__(self, stored: Sequence[Tensor], bags: Bags) -> Tensor:
        self._check(stored)
        own = bags.select(self.features)
        own.checked = True
        self._put(stored)
        try:
            with torch.no_grad():
                return self.engine(self.tables, own)
        finally:
            self._put(self.empty)

    def _put(self, stored: Sequence[Tensor]) -> None:
        for (values, name), tensor in zip(self.places, stored, strict=True):
            values[name] = tensor

    def _check(self, stored: Sequence[Tensor]) -> None:
        """The kernels read what the shapes of the tables promise."""
        if [(tensor.shape, tensor.dtype) for tensor in stored] == self.layouts:
            return
        names = [
            f"table {table!r}: {name}" for table, own in self.tables.items() for _, name in _places_of(own)
        ]
        if len(stored) != len(names):
            raise ConfigError(
                f"stored has {len(stored)} tensors and the tables {len(names)} ({names[0]} to {names[-1]}); "
                "give the tensors that the program was exported with"
            )
        for name, tensor, (shape, dtype) in zip(names, stored, self.layouts, strict=True):
            if (tensor.shape, tensor.dtype) != (shape, dtype):
                raise ConfigError(
                    f"{name} is {dtype} of shape {tuple(shape)}, and stored has {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}; give the tensors that the program was exported with"
                )


def _places_of(table: Backend) -> list[tuple[dict[str, Any], str]]:
    """Where the stored tensors of a table are: its parameters, then its cached rows and their ids."""
    cache = table.cache
    held = [table._parameters] if cache is None else [table._parameters, cache._parameters]
    places: list[tuple[dict[str, Any], str]] = [(values, name) for values in held for name in values]
    return places if cache is None else [*places, (cache._buffers, "ids")]


def stored_tensors(tables: Sequence[Backend]) -> list[Tensor]:
    """The ``stored`` of an op, table by table: parameters, or what stands in their place."""
    found: list[Tensor] = []
    for table in tables:
        cache = table.cache
        for held in (table,) if cache is None else (table, cache):
            held.renew()
            found += [] if held._owner else held.weights().values()
        found += [] if cache is None else [cache.ids]
    return found


# By the memory of their first weights, with which they go, and by text: programs that no call is using. What
# they have worked out, such as where the cached rows are, is of these weights.
_idle: Any = WeakIdKeyDictionary()
_lock = Lock()


def _idle_programs(tables: str, stored: Sequence[Tensor]) -> list[_Program]:
    if not stored:
        return []
    memory = stored[0].untyped_storage()
    with _lock:
        by_text: dict[str, list[_Program]] | None = _idle.get(memory)
        if by_text is None:
            by_text = _idle[memory] = {}
        return by_text.setdefault(tables, [])


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
    for tensor in stored:
        if tensor.device != ids.device:
            raise BatchError(
                f"the batch is on {ids.device} and the tables on {tensor.device}; move the batch there"
            )
    idle = _idle_programs(tables, stored)
    # Threads take one each.
    program = idle.pop() if idle else _Program(_description(tables))
    try:
        return program(stored, _bags(ids, offsets, weights, tables)).float()
    finally:
        idle.append(program)


def _fake_look_up(
    stored: list[Tensor], ids: Tensor, offsets: Tensor, weights: Tensor | None, tables: str
) -> Tensor:
    description = _description(tables)
    columns = sum(table.embedding_dim * len(table.feature_names) for table in description.tables)
    size = (offsets.shape[0] - 1) // len(description.keys)
    return ids.new_empty(size, columns, dtype=torch.float32)


def _no_gradients(context: object, grad: Tensor) -> NoReturn:
    raise RuntimeError(
        "exported programs are for inference: recemb::embedding_bags has no gradients; train the "
        "EmbeddingBagCollection and export it again"
    )


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

torch.library.register_autograd("recemb::embedding_bags", _no_gradients, lib=_LIBRARY)

checked_ids = torch.ops.recemb.check_bags
look_up = torch.ops.recemb.embedding_bags
