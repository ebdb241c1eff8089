"""How the ranks hold the compressed tables of one sharding type and slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.types import ParameterSharding, ShardingType

from recemb.backends import backend_of
from recemb.backends.base import Backend
from recemb.backends.row_split import RowSplit
from recemb.spec import TableSpec
from recemb.torchrec_io.sharding.replicas import Replicas
from recemb.torchrec_io.sharding.state import RowShards
from recemb.torchrec_io.sharding.tables import CompressedTables

TABLE_WISE, DATA_PARALLEL = ShardingType.TABLE_WISE.value, ShardingType.DATA_PARALLEL.value
ROW_WISE = ShardingType.ROW_WISE.value


def row_split(table: TableSpec, ranks: int) -> RowSplit | None:
    """How a compressed table is cut row-wise over ``ranks``, or ``None`` when its method cannot be."""
    return backend_of(table).split_rows(table, ranks)


@dataclass(frozen=True, eq=False)
class Held:
    """The compressed tables of one sharding type and slice, as the ranks hold them.

    Table-wise, a table lies on one rank, with its cache. Data-parallel, on every rank: gradients are averaged
    over them. Row-wise, each rank has some rows of one parameter and the others whole, whose gradients are
    summed: each rank has the whole batch's samples, but only its own ids.

    Attributes:
        tables: the collection's compressed tables.
        kind: torchrec's sharding type.
        plan: of these tables, by name.
        group: the ranks.
    """

    tables: CompressedTables
    kind: str
    plan: Mapping[str, ParameterSharding]
    group: dist.ProcessGroup | None

    @cached_property
    def splits(self) -> dict[str, RowSplit]:
        """Of tables that are cut row-wise."""
        found = {}
        for name in self.plan if self.kind == ROW_WISE else ():
            split = row_split(self.tables.specs[name], dist.get_world_size(self.group))
            assert split is not None, "check_plan lets no other pass"
            found[name] = split
        return found

    def specs(self, names: Sequence[str]) -> list[TableSpec]:
        """The tables as this rank holds them."""
        rank = dist.get_rank(self.group)
        return [
            self.splits[name].tables[rank] if name in self.splits else self.tables.specs[name]
            for name in names
        ]

    @cached_property
    def shards(self) -> dict[str, RowShards]:
        """``<table>.<tensor>`` -> its ranges of rows, of what not every rank holds whole."""
        rank, found = dist.get_rank(self.group), {}
        for key, tensor in self.tables.stored.items():
            name, _, param = key.partition(".")
            if name not in self.plan or self.kind == DATA_PARALLEL:
                continue
            sharding = self.plan[name]
            placements = [shard.placement for shard in sharding.sharding_spec.shards]
            if self.kind == TABLE_WISE:
                own = 0 if sharding.ranks[0] == rank else None
                found[key] = RowShards([tensor.shape[0]], placements, own, self.group)
            elif param == self.splits[name].param:
                found[key] = RowShards(self.splits[name].rows, placements, rank, self.group)
        return found

    @cached_property
    def shown(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """How the optimizer state of these parameters appears in a state dict."""
        return {key: shards.state for key, shards in self.shards.items()}

    def replicas(self, backends: Mapping[str, Backend]) -> Replicas:
        """Those of the parameters that every rank holds whole."""
        keys = [
            f"{name}.{param}"
            for name, backend in backends.items()
            for param, _ in backend.named_parameters(recurse=False)
            if f"{name}.{param}" not in self.shards
        ]
        divisor = dist.get_world_size(self.group) if self.kind == DATA_PARALLEL else 1
        return Replicas(backends, keys, self.group, divisor)
