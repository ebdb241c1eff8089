"""Random offset block embedding, ROBE-Z (Desai et al., MLSys 2022, arXiv 2108.02191).

One array M serves every table of a group. Element j of row x of table e lies in block b = j // Z and is

    g(e, x, b) * M[(h(e, x, b) mod |M| + j mod Z) mod |M|]

with h universal and g = +-1 hashed per block (1 unless ``use_sign``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from recemb.backends.base import Backend, Leaving
from recemb.backends.stored_settings import SHARED_WITH
from recemb.errors import ConfigError
from recemb.id_maps.hashing import UniversalHash, stable_integer
from recemb.id_maps.radix import ceil_div
from recemb.spec import ROBE, TableSpec
from recemb_kernels.lookup import TableShape
from recemb_kernels.robe_gather import RobeShape, robe_gather

_LONGEST_BLOCK = 8192


class ROBEBackend(Backend):
    """array [|M| / Z, Z], held by the first table of the group; slots are block starts in [0, |M|).

    A table is hashed by its name, so that neither the order of the tables nor the rank they live on
    changes a row. A block whose sign is -1 has the slot ``~start``.
    """

    compression_type = ROBE
    array: nn.Parameter

    @classmethod
    def storage_key(cls, table: TableSpec) -> str:
        return _compression(table).group

    @classmethod
    def param_shapes(cls, tables: Sequence[TableSpec]) -> dict[str, tuple[int, int]]:
        first = _compression(tables[0])
        for table in tables[1:]:
            # Each table has a cache of its own.
            if replace(_compression(table), cache=first.cache) != first or table.dtype != tables[0].dtype:
                raise ConfigError(
                    f"tables {tables[0].name!r} ({first}, {tables[0].dtype}) and {table.name!r} "
                    f"({table.compression}, {table.dtype}) share the ROBE array {first.group!r} but differ; "
                    "use equal settings or another group"
                )
        dense_numel = sum(table.dense_numel for table in tables)
        blocks = max(1, round(dense_numel / first.compress_rate / first.block_size))
        widest = max(tables, key=lambda table: table.embedding_dim)
        if blocks * first.block_size < widest.embedding_dim:
            rate = dense_numel / ceil_div(widest.embedding_dim, first.block_size) / first.block_size
            raise ConfigError(
                f"table {widest.name!r}: the ROBE array {first.group!r} has {blocks * first.block_size} "
                f"weights, fewer than embedding_dim={widest.embedding_dim}; use "
                f"{f'compress_rate <= {rate:.6g} or ' if rate >= 1 else ''}block_size={widest.embedding_dim}"
            )
        return {"array": (blocks, first.block_size)}

    @classmethod
    def stored_settings(cls, table: TableSpec, peers: Sequence[TableSpec]) -> dict[str, Any]:
        compression = _compression(table)
        # Which tables have trained the array, whatever their group is called and in whatever order they are.
        first = min(peer.name for peer in peers)
        return {"seed": compression.seed, "use_sign": compression.use_sign, SHARED_WITH: first}

    @property
    def storage(self) -> Tensor:
        """The shared array."""
        return self.weights()["array"]

    def map_ids(self, ids: Tensor) -> Tensor:
        compression = _compression(self.table)
        (blocks, block_size), table = self.storage.shape, stable_integer(self.table.name)
        per_row = ceil_div(self.table.embedding_dim, block_size)
        place = UniversalHash.from_seed(compression.seed, "robe/slot")
        starts = place.blocks(table, ids, per_row) % (blocks * block_size)
        if not compression.use_sign:
            return starts
        sign = UniversalHash.from_seed(compression.seed, "robe/sign").blocks(table, ids, per_row) & 1
        return torch.where(sign == 1, ~starts, starts)

    def _elements(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """[L, D] position in the flat array of every element of a row, and whether it is negated."""
        block_size = self.storage.shape[1]
        position = torch.arange(self.table.embedding_dim, device=slots.device)
        block = slots[:, position // block_size]
        negative = block < 0
        start = torch.where(negative, ~block, block)
        return (start + position % block_size) % self.storage.numel(), negative

    def rows(self, slots: Tensor) -> Tensor:
        index, negative = self._elements(slots)
        values = self.storage.view(-1)[index]
        return torch.where(negative, -values, values) if _compression(self.table).use_sign else values

    def native_shape(self) -> TableShape | None:
        return None if self.lacks_kernel() else TableShape(robe_gather, _shape(self.peers, len(self.array)))

    def lacks_kernel(self) -> str | None:
        # It is compiled for one dim.
        if any(peer.embedding_dim != self.table.embedding_dim for peer in self.peers):
            return (
                "ROBE arrays have kernels where their tables are of one dim; give each dim a group of its own"
            )
        # A few blocks are on the stack of each thread.
        if _compression(self.table).block_size > _LONGEST_BLOCK:
            return f"ROBE arrays have kernels for blocks of up to {_LONGEST_BLOCK} weights"
        return None

    def reset_parameters(self) -> None:
        if self._owner:
            return
        # One array serves tables of different sizes: match their mean variance, weighted by their weights.
        total = sum(table.dense_numel for table in self.peers)
        variance = sum(table.dense_numel * table.row_std**2 for table in self.peers) / total
        bound = math.sqrt(3 * variance)
        with torch.no_grad():
            self.array.uniform_(-bound, bound)

    def approximate(self, weight: Tensor) -> dict[str, Tensor]:
        """Least squares: every weight of M becomes the mean of the elements hashed onto it."""
        if len(self.peers) > 1:
            others = [table.name for table in self.peers if table.name != self.table.name]
            raise ConfigError(
                f"table {self.table.name!r}: from_dense is not available because its ROBE array "
                f"{_compression(self.table).group!r} is shared with {', '.join(map(repr, others))}, whose "
                "rows would change too; give the table a group of its own"
            )
        device = self.storage.device
        total = torch.zeros(self.storage.numel(), dtype=torch.float64, device=device)
        count = torch.zeros_like(total)
        for first, last in self.row_blocks(0, weight.shape[0]):
            index, negative = self._elements(self.map_ids(torch.arange(first, last, device=device)))
            signed = torch.where(negative, -weight[first:last], weight[first:last]).double()
            total.index_add_(0, index.flatten(), signed.flatten())
            count.index_add_(0, index.flatten(), torch.ones_like(signed).flatten())
        return {"array": (total / count.clamp(min=1)).view(self.storage.shape)}

    def write_back(self, ids: Tensor, values: Tensor, cost: float) -> None:
        self.write_back_together([Leaving(self, ids, values, cost)])

    @torch.no_grad()
    def write_back_together(self, leaving: Sequence[Leaving]) -> None:
        """Damped least squares: each weight moves by what the elements of ``leaving`` hashed onto it ask for.

        Without a cost that is their mean, exact where no two of them share a weight. How many elements of
        other rows of the group's tables share it is taken to be the mean, N * D / |M|, and what a change of
        them costs to be the mean over those that ask.
        """
        places, asked, costs = [], [], []
        for own in leaving:
            assert isinstance(own.table, ROBEBackend)
            slots = own.table.map_ids(own.ids)
            index, negative = own.table._elements(slots)
            residual = own.values.double() - own.table.rows(slots).double()
            places.append(index.flatten())
            asked.append(torch.where(negative, -residual, residual).flatten())
            costs.append(torch.full_like(asked[-1], own.cost))
        weights, inverse, counts = torch.unique(torch.cat(places), return_inverse=True, return_counts=True)
        # Of integers and a float torch makes float32.
        counts = counts.to(asked[0].dtype)
        total, cost = (
            torch.zeros_like(counts).index_add_(0, inverse, torch.cat(each)) for each in (asked, costs)
        )
        flat = self.storage.view(-1)
        load = sum(peer.dense_numel for peer in self.peers) / flat.numel()
        others = (load - counts).clamp(min=0)
        damped = counts + cost / counts * others
        flat[weights] = (flat[weights].double() + total / damped).to(flat.dtype)


def _compression(table: TableSpec) -> ROBE:
    assert isinstance(table.compression, ROBE)
    return table.compression


@lru_cache(maxsize=256)
def _shape(peers: tuple[TableSpec, ...], rows: int) -> RobeShape:
    compression, dim = _compression(peers[0]), peers[0].embedding_dim
    blocks = ceil_div(dim, compression.block_size)
    hashes = [UniversalHash.from_seed(compression.seed, f"robe/{kind}") for kind in ("slot", "sign")]
    slot, sign = hashes
    *bases, num_keys = [0, *accumulate(peer.num_embeddings for peer in peers)]
    tables = [stable_integer(peer.name) for peer in peers]
    return RobeShape(
        dim=dim,
        block_size=compression.block_size,
        rows=rows,
        signed=compression.use_sign,
        slot=(slot.b, slot.q),
        sign=(sign.b, sign.q),
        key_bases=tuple(bases),
        offsets=tuple(x for table in tables for family in hashes for x in family.offsets(table, blocks)),
        num_keys=num_keys,
    )
