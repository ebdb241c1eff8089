"""Whether a state dict is of these tables: its shapes, and settings by which a table reads its parameters.

Parameters of two tables may have the same names and shapes and be other rows all the same: of
``QuotientRemainder`` with another operation, of ``ROBE`` with another seed. A state dict of torch's says what
each of its modules is in ``_metadata``, which ``torch.save`` keeps, and which adds no key that another module
would have to know. A collection notes its tables' settings there, and refuses those of others when it loads.
What comes without them (a state of before, of :mod:`torch.distributed.checkpoint`, of the plain dicts that
``DistributedModelParallel`` cuts a state into) is loaded as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from recemb.backends import storages
from recemb.backends.stored_settings import misfits
from recemb.cache.loading import misfit_of_state
from recemb.errors import ConfigError
from recemb.spec import SETTINGS_KEY, TableSpec


def note_settings(tables: Iterable[TableSpec], metadata: dict[str, Any]) -> None:
    """Write the settings of some tables into a collection's metadata of a state dict."""
    found = {
        table.name: settings
        for backend, peers in storages(tables)
        for table in peers
        if (settings := backend.stored_settings(table, peers))
    }
    if found:
        metadata[SETTINGS_KEY] = found


def check_settings(
    tables: Iterable[TableSpec], state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> None:
    """That the parameters in a state are read by these tables as by those that they were saved from.

    Args:
        tables: of the collection.
        state: what is loaded; tables of which it holds nothing are not asked about.
        prefix: of the collection's keys in it.
        metadata: the collection's in it; it may be of a file, and is taken for no more than data.

    Raises:
        ConfigError: they are not; nothing of the collection has been loaded.
    """
    noted = metadata.get(SETTINGS_KEY)
    for backend, peers in storages(tables):
        # A storage has the name of its first table.
        own = f"{prefix}embedding_bags.{peers[0].name}."
        if not any(key.startswith(own) for key in state):
            continue
        settings = {table.name: backend.stored_settings(table, peers) for table in peers}
        for table, name, theirs, value in misfits(settings, noted):
            raise ConfigError(
                f"table {table!r}: the state to load was saved with {name}={theirs!r} and this table has "
                f"{name}={value!r}, by which the same numbers are other rows; build the table as it was "
                "saved. load_state_dict(dict(state)) loads the numbers all the same"
            )


def check_caches(tables: Iterable[TableSpec], state: Mapping[str, Any], prefix: str) -> None:
    """That the caches in a state are of as many rows as those of these tables, and of the same policies.

    Arguments and errors as of :func:`check_settings`.
    """
    for table in tables:
        cache = table.compression.cache
        if cache is not None:
            own = f"{prefix}embedding_bags.{table.name}.cache."
            wrong = misfit_of_state(table.name, table.cache_rows, cache.policy, state, own)
            if wrong:
                raise ConfigError(wrong)


def check_shapes(own: Mapping[str, Tensor], state: Mapping[str, Any], prefix: str) -> None:
    """That what a state holds for these tables has the shapes that theirs have; torch loads what fits first.

    Args:
        own: ``<table>.<key>`` -> the tensor that is loaded into.
        state: what is loaded.
        prefix: of the collection's keys in it.

    Raises:
        ConfigError: of the first that has not; nothing of the collection has been loaded.
    """
    for key, tensor in own.items():
        name = f"{prefix}embedding_bags.{key}"
        given = state.get(name, tensor)
        if not isinstance(given, Tensor):
            raise ConfigError(f"{name}: the state to load has a {type(given).__name__}, not a tensor")
        if tuple(given.size()) != tuple(tensor.size()):
            raise ConfigError(
                f"{name}: the state to load has shape {tuple(given.size())}, not {tuple(tensor.size())}; it "
                "is of another table or compression; build the table as it was saved"
            )
