"""Whether parameters are read by tables as by those that they were saved from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Names one of the tables that a storage is shared with. Rows are hashed by their table's name, so which
# others share it does not matter; that tables of one storage come from one does.
SHARED_WITH = "array_shared_with"


def misfits(own: Mapping[str, Mapping[str, Any]], noted: Any) -> Iterator[tuple[str, str, Any, Any]]:
    """What of ``noted`` differs: table, setting, its value there, and here.

    Args:
        own: by table, :meth:`recemb.backends.base.Backend.stored_settings`.
        noted: the same of what is loaded, as a file has it: no more than data.
    """
    if not isinstance(noted, Mapping):
        return
    first: dict[Any, Any] = {}
    for table, settings in own.items():
        theirs = noted.get(table)
        if not isinstance(theirs, Mapping):
            continue
        for name, value in settings.items():
            if name not in theirs:
                continue
            found = theirs[name]
            if found != (first.setdefault(value, found) if name == SHARED_WITH else value):
                yield table, name, found, value
