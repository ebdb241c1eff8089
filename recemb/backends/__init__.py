"""One backend per compression method, behind the seam of :mod:`recemb.backends.base`.

A new method is one file here, one line in ``BACKENDS``, one line in the contract cases and one oracle test.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from recemb.backends.base import Backend
from recemb.backends.dense import DenseBackend
from recemb.backends.mixed_dimension import MixedDimensionBackend
from recemb.backends.quotient_remainder import QuotientRemainderBackend
from recemb.backends.robe import ROBEBackend
from recemb.backends.tensor_train import TensorTrainBackend
from recemb.errors import ConfigError
from recemb.spec import TableSpec

BACKENDS: tuple[type[Backend], ...] = (
    DenseBackend,
    TensorTrainBackend,
    QuotientRemainderBackend,
    ROBEBackend,
    MixedDimensionBackend,
)


def backend_of(table: TableSpec) -> type[Backend]:
    """The backend that stores ``table``."""
    for backend in BACKENDS:
        if isinstance(table.compression, backend.compression_type):
            return backend
    known = ", ".join(backend.compression_type.__name__ for backend in BACKENDS)
    raise ConfigError(f"table {table.name!r}: no backend stores {table.compression!r}; known are {known}")


def storages(tables: Iterable[TableSpec]) -> list[tuple[type[Backend], list[TableSpec]]]:
    """Group tables by the storage they share, in the order of each storage's first table."""
    groups: dict[tuple[type[Backend], str], list[TableSpec]] = {}
    for table in tables:
        backend = backend_of(table)
        groups.setdefault((backend, backend.storage_key(table)), []).append(table)
    return [(backend, peers) for (backend, _), peers in groups.items()]


def build(tables: Sequence[TableSpec], device: torch.device) -> dict[str, Backend]:
    """Allocate every table, by name, in the order given; ``reset_parameters`` fills them.

    Raises:
        ConfigError: a table cannot be stored as asked, or two tables share a name.
    """
    names = [table.name for table in tables]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"duplicate table name {twice!r}; give each table a name of its own")
    reserved = nn.ModuleDict()
    for name in names:
        # torch answers with a bare KeyError; torchrec keeps its tables in a ModuleDict.
        if hasattr(reserved, name):
            raise ConfigError(
                f"table name {name!r} is taken by torch's nn.ModuleDict; use another, e.g. {'t_' + name!r}"
            )
    # A cache is a backend itself, so it is known only once this package is.
    from recemb.cache.hot_rows import HotRowCache

    built: dict[str, Backend] = {}
    for backend, peers in storages(tables):
        owner: Backend | None = None
        for table in peers:
            module = backend(table, peers, owner, device)
            owner = owner or module
            if table.cache_rows:
                module.cache = HotRowCache(table, device)
            built[table.name] = module
    return {name: built[name] for name in names}
