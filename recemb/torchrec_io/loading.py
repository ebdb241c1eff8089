"""What a collection does before it loads a state: refuses keys, shapes, types and caches of other tables.

torch loads what fits and raises in the end; here nothing of the collection has been loaded by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recemb.backends import storages
from recemb.cache.loading import holds_part_of, misfit_of_state
from recemb.errors import StateError
from recemb.spec import TableSpec

BAGS = "embedding_bags"


class StrictKeys:
    """A base of collections, before torch's: a state of other keys is refused before anything is loaded.

    Within a model it is torch that finds them, when it has loaded the others: modules are not told whether a
    load is strict.
    """

    def load_state_dict(
        self: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """torch's.

        Raises:
            StateError: a state of other tables, compressions or caches; nothing has changed.
        """
        if strict:
            check_keys(self, state_dict)
        loaded: Any = super()
        return loaded.load_state_dict(state_dict, strict=strict, assign=assign)


def check_caches(
    tables: Iterable[TableSpec], state: Mapping[str, Any], prefix: str, *, counted: bool = True
) -> None:
    """That the caches in a state are whole, of as many rows as those of these tables, and of their policies.

    Args:
        tables: of the collection.
        state: what is loaded.
        prefix: of the collection's keys in it.
        counted: whether these tables' caches have counters, which are of a policy.

    Raises:
        StateError: they are not; nothing of the collection has been loaded.
    """
    for table in tables:
        cache = table.compression.cache
        if cache is not None:
            own = f"{prefix}{BAGS}.{table.name}.cache."
            policy = cache.policy if counted else None
            wrong = misfit_of_state(table.name, table.cache_rows, policy, state, own)
            if wrong:
                raise StateError(wrong)


def check_keys(module: nn.Module, state: Mapping[str, Any]) -> None:
    """That a state has the keys of a collection's tables, as a strict load asks; torch loads what fits first.

    Where others' hooks are, which may rename keys or forgive them, torch is left to find out; so it is of a
    state with nothing of any table.

    Args:
        module: the collection, which has one hook of its own.
        state: what is loaded.

    Raises:
        StateError: of the first table whose keys differ; nothing of the collection has been loaded.
    """
    if not isinstance(state, Mapping):
        return
    parts = [module, *module.get_submodule(BAGS).modules()]
    hooks = sum(len(m._load_state_dict_pre_hooks) + len(m._load_state_dict_post_hooks) for m in parts)
    there = _by_table(state)
    if hooks > 1 or not there:
        return
    here = _by_table(module.state_dict(keep_vars=True))
    for table in dict.fromkeys([*here, *there]):
        names = here.get(table, set()), there.get(table, set())
        if names[0] != names[1]:
            ids = state.get(f"{BAGS}.{table}.cache.ids")
            rows = ids.numel() if isinstance(ids, Tensor) else 0
            raise StateError(f"table {table!r}: the state to load {_of_other_keys(*names, rows)}")


def _by_table(keys: Iterable[str]) -> dict[str, set[str]]:
    """``q``, ``cache.ids`` ..., of each table."""
    found: dict[str, set[str]] = {}
    for key in keys:
        bags, _, rest = key.partition(".")
        if bags == BAGS:
            table, _, name = rest.partition(".")
            found.setdefault(table, set()).add(name)
    return found


def _of_other_keys(here: set[str], there: set[str], rows: int) -> str:
    """What a state has instead of a table's keys, and what to do about it."""
    cached_here, cached_there = ({n for n in names if n.startswith("cache.")} for names in (here, there))
    own, theirs = here - cached_here, there - cached_there
    if own != theirs and not there:
        return "has nothing of it; load with strict=False, which leaves it as it is"
    if own != theirs and not here:
        return (
            f"has {_listed(there)}, and the collection has no such table; build it with the tables that were "
            "saved, or load with strict=False, which leaves this one out"
        )
    if own != theirs:
        return (
            f"has {_listed(theirs)} and this table has {_listed(own)}: it is of another compression; build "
            "the table as it was saved"
        )
    if not cached_there:
        return (
            "has no cache; build it without cache=HotRows(...), or load with strict=False, which starts an "
            "empty cache"
        )
    if not cached_here:
        return (
            f"has a cache and this table has none; build it with cache=HotRows(rows={rows}), or load with "
            "strict=False, which leaves out what the cached rows have learned"
        )
    differ = [
        f"{what} {_listed(names)}"
        for what, names in (("lacks", here - there), ("has", there - here))
        if names
    ]
    return f"{' and '.join(differ)}, unlike this table; load with strict=False, which takes what it can"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def empty_caches(
    tables: Iterable[TableSpec], caches: Mapping[str, Any], state: Mapping[str, Any], prefix: str
) -> None:
    """Before a state is loaded, empty the caches of tables that it holds, and whose caches it does not.

    Their rows would stay in front of those that are loaded.

    Args:
        tables: of the collection.
        caches: those of these tables that are here.
        state: what is loaded.
        prefix: of the collection's keys in it.
    """
    for _, peers in storages(tables):
        if not any(table.name in caches for table in peers):
            continue
        first = f"{prefix}{BAGS}.{peers[0].name}."
        if not any(key.startswith(first) and not key.startswith(f"{first}cache.") for key in state):
            continue
        for table in peers:
            own = f"{prefix}{BAGS}.{table.name}.cache."
            if table.name in caches and not any(holds_part_of(state, own)):
                caches[table.name].reset()


def check_tensors(
    own: Mapping[str, Tensor], state: Mapping[str, Any], prefix: str, *, assign: bool = False
) -> None:
    """That what a state holds for these tables has their shapes, and types; torch loads what fits first.

    A parameter of floats may become one of another type.

    Args:
        own: ``<table>.<key>`` -> the tensor that is loaded into.
        state: what is loaded.
        prefix: of the collection's keys in it.
        assign: whether its tensors take the place of the own ones, and are not converted.

    Raises:
        StateError: of the first that has not; nothing of the collection has been loaded.
    """
    for key, tensor in own.items():
        name = f"{prefix}{BAGS}.{key}"
        given = state.get(name, tensor)
        if not isinstance(given, Tensor):
            raise StateError(f"{name}: the state to load has a {type(given).__name__}, not a tensor")
        if tuple(given.size()) != tuple(tensor.size()):
            raise StateError(
                f"{name}: the state to load has shape {tuple(given.size())}, not {tuple(tensor.size())}; it "
                "is of another table or compression; build the table as it was saved"
            )
        if given.dtype == tensor.dtype:
            continue
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and given.is_floating_point():
            continue
        if assign or not torch.can_cast(given.dtype, tensor.dtype):
            how = " and assign=True takes it as it is" if assign else ""
            raise StateError(
                f"{name}: the state to load has {given.dtype}, not {tensor.dtype}{how}; convert it, e.g. "
                f"state[{name!r}] = state[{name!r}].to({tensor.dtype})"
            )
