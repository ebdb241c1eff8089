"""A trained table whose parameters are stored in bytes or half precision.

It is a backend like the one it comes from, so that the engine looks it up in the same calls: kernels on the
CPU widen the rows they read. Where there are none, plain torch widens the rows that a batch touches.

Every method's row f(p) is multilinear in its parameters, with coefficients 1 or -1. So where each weight p is
read within d of it (:mod:`recemb.inference.rows`), a row is off by at most

    | f(|p| + d) - f(|p|) |

element by element, and a bag by the sum of that over its rows, times their weights; in exact arithmetic, to
which float32 adds its own rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from recemb.backends import backend_of, storages
from recemb.backends.base import Backend, Memo
from recemb.backends.native import owner_of
from recemb.cache.hot_rows import HotRowCache
from recemb.cache.streams import replace_by_rows
from recemb.errors import ConfigError
from recemb.inference.rows import read_rows, smallest, store_rows
from recemb.spec import TableSpec
from recemb_kernels.lookup import TableShape
from recemb_kernels.storage import DTYPES, StoredAs, stored_width

_META = torch.device("meta")


class QuantizedBackend(Backend):
    """The stored parameters of one table, under the names that they had.

    Args:
        table: the table.
        peers: the tables that share its storage.
        owner: the one that holds the parameters, or ``None`` when this is it.
        kind: what is asked for; parameters of narrow rows take half precision for bytes.
        device: where the parameters live; zeros until they are filled.
    """

    def __init__(
        self,
        table: TableSpec,
        peers: Sequence[TableSpec],
        owner: QuantizedBackend | None,
        kind: StoredAs,
        device: torch.device,
    ) -> None:
        nn.Module.__init__(self)
        self.table, self.peers = table, tuple(peers)
        self._owner = () if owner is None else (owner,)
        self.memo = Memo()
        self.cache: HotRowCache | None = None
        # Knows the method's mathematics; holds no memory, and is no part of the module.
        self._method = (self._on_meta(),)
        shapes = self.param_shapes(self.peers)
        self._widths = {name: width for name, (_, width) in shapes.items()}
        self.asked = kind
        self.kinds = {name: smallest(kind, width) for name, (_, width) in shapes.items()}
        self.layout = tuple(
            (name, (rows, stored_width(self.kinds[name], width))) for name, (rows, width) in shapes.items()
        )
        if owner is not None:
            return
        for name, shape in self.layout:
            stored = torch.zeros(shape, dtype=DTYPES[self.kinds[name]], device=device)
            self.register_parameter(name, nn.Parameter(stored, requires_grad=False))

    @classmethod
    def param_shapes(cls, tables: Sequence[TableSpec]) -> dict[str, tuple[int, int]]:
        """Of the parameters as trained; bytes have four columns more."""
        return backend_of(tables[0]).param_shapes(tables)

    @property
    def row_dtype(self) -> torch.dtype:
        return torch.float32

    def map_ids(self, ids: Tensor) -> Tensor:
        return self._method[0].map_ids(ids)

    @torch.no_grad()
    def rows(self, slots: Tensor) -> Tensor:
        """The rows at ``slots``, from the widened rows of the parameters that these touch."""
        if not slots.shape[0]:
            return torch.zeros(0, self.table.embedding_dim, device=slots.device)
        method, columns = self._on_meta(), list(slots.unbind(dim=1))
        for k, (name, stored) in enumerate(self.own_parameters().items()):
            touched: Tensor = stored
            if method.slots_are_rows and k < len(columns):
                rows, columns[k] = torch.unique(columns[k], return_inverse=True)
                touched = stored[rows]
            wide = nn.Parameter(read_rows(touched, self.kinds[name], self._widths[name]), requires_grad=False)
            method.register_parameter(name, wide)
        return method.rows(torch.stack(columns, dim=1))

    @property
    def row_numel(self) -> int:
        return self._method[0].row_numel

    def lacks_kernel(self) -> str | None:
        return self._method[0].lacks_kernel()

    def native_shape(self) -> TableShape | None:
        shape = self._method[0].native_shape()
        kinds = tuple(self.kinds.values())
        if shape is None or all(kind is StoredAs.FLOAT32 for kind in kinds):
            return shape
        return replace(shape, stored=kinds)

    def reset_parameters(self) -> None:
        raise ConfigError(
            f"table {self.table.name!r} is quantised: its parameters are not drawn but made of trained ones "
            "by quantize_embeddings, or loaded by load_state_dict"
        )

    @torch.no_grad()
    def fill(self, trained: Backend) -> None:
        """Take a trained table's parameters, as :meth:`Backend.renew` leaves them, and its cached rows.

        Raises:
            ConfigError: a weight cannot be stored; no parameter has changed.
        """
        if not self._owner:
            name = self.table.name
            stored = {
                key: store_rows(weight, self.kinds[key], f"table {name!r}: {key}")
                for key, weight in trained.weights().items()
            }
            for key, value in stored.items():
                self._parameters[key] = nn.Parameter(value, requires_grad=False)
        if self.cache is not None and trained.cache is not None:
            cast(QuantizedBackend, self.cache).fill(trained.cache)
            self.cache.ids = trained.cache.ids.detach().clone()

    @property
    def stored_bytes(self) -> int:
        """Of the parameters that this table owns."""
        return sum(p.numel() * p.element_size() for p in self.parameters(recurse=False))

    def _on_meta(self) -> Backend:
        return backend_of(self.table)(self.table, self.peers, None, _META)


class QuantizedRows(QuantizedBackend):
    """The cached rows of a table, [C] ids beside them; -1 where a slot is free. They stay as they are."""

    ids: Tensor

    def __init__(self, table: TableSpec, kind: StoredAs, device: torch.device) -> None:
        rows = replace_by_rows(table)
        super().__init__(rows, (rows,), None, kind, device)
        self.register_buffer("ids", torch.full((table.cache_rows,), -1, device=device))

    @torch.no_grad()
    def reset(self) -> None:
        """Free all slots."""
        self.ids.fill_(-1)


def build_quantized(
    tables: Sequence[TableSpec], kinds: Mapping[str, StoredAs], device: torch.device
) -> dict[str, QuantizedBackend]:
    """Every table, by name, filled with zeros.

    Args:
        tables: the tables.
        kinds: by table, what is asked for.
        device: where the parameters live.

    Raises:
        ConfigError: tables that share their parameters are to be stored differently.
    """
    built: dict[str, QuantizedBackend] = {}
    for _, peers in storages(tables):
        owner: QuantizedBackend | None = None
        for table in peers:
            first = peers[0].name
            if kinds[table.name] is not kinds[first]:
                raise ConfigError(
                    f"tables {first!r} ({kinds[first].name}) and {table.name!r} ({kinds[table.name].name}) "
                    "share their parameters, which can be stored in one way only; give them one dtype in "
                    "per_table_weight_dtype"
                )
            made = QuantizedBackend(table, peers, owner, kinds[table.name], device)
            owner = owner or made
            if table.cache_rows:
                made.cache = cast(HotRowCache, QuantizedRows(table, kinds[table.name], device))
            built[table.name] = made
    return {table.name: built[table.name] for table in tables}


def stored_bytes(tables: Mapping[str, QuantizedBackend]) -> dict[str, int]:
    """Bytes of each table's parameters, a shared array split by N * D, with cached rows and their ids."""
    found: dict[str, int] = {}
    for name, table in tables.items():
        dense, total = sum(peer.dense_numel for peer in table.peers), owner_of(table).stored_bytes
        before = sum(peer.dense_numel for peer in table.peers[: table.peers.index(table.table)])
        share = total * (before + table.table.dense_numel) // dense - total * before // dense
        cache = cast("QuantizedRows | None", table.cache)
        cached = 0 if cache is None else cache.stored_bytes + cache.ids.numel() * cache.ids.element_size()
        found[name] = share + cached
    return found
