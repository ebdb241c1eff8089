"""Settings by which a table reads its parameters, kept beside them in state dicts.

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

from recemb.backends import storages
from recemb.backends.stored_settings import misfits
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
