"""A sharding plan as a JSON file, and back.

::

    {"format": "recemb-plan", "version": 1,
     "world_size": 8, "local_world_size": 8, "device": "cuda", ...
     "tables": {"t_cat_0": {"num_embeddings": 1460, "embedding_dim": 16, "dtype": "float32",
                            "compression": "Dense(cache=None)"}, ...},
     "modules": {"sparse_arch.embedding_bag_collection": {
        "t_cat_0": {"sharding_type": "table_wise", "compute_kernel": "fused", "ranks": [3],
                    "shape": [1460, 16]}, ...}},
     "estimate": {...}}

``ranks`` is ``"all"`` for a shard on every rank; ``columns`` is the width of column-wise shards; ``shape`` is
that of the weight torchrec plans. Everything else of torchrec's ``ShardingPlan`` follows from these.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets, placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection as TorchrecEmbeddingBagCollection

from recemb.data.layout import write_json
from recemb.errors import ConfigError
from recemb.id_maps.radix import ceil_div
from recemb.spec import TableSpec
from recemb.torchrec_io.configs import table_spec
from recemb.torchrec_io.planning.planned import Planned
from recemb.torchrec_io.sharding.sharder import get_sharders

COLUMNS_CUT = (
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
)
EVERYWHERE = (ShardingType.ROW_WISE.value, ShardingType.DATA_PARALLEL.value)
BY_HOST = (ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)
# Which ranks share a host decides where their shards may lie.
WITHIN_HOSTS = (*BY_HOST, ShardingType.TABLE_COLUMN_WISE.value)


class TableEntry(BaseModel):
    """How one table is sharded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sharding_type: str
    compute_kernel: str
    ranks: Literal["all"] | list[Annotated[int, Field(ge=0)]]
    shape: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    columns: PositiveInt | None = None

    def check(self, name: str, world: int, local: int) -> None:
        """Raise ``ValueError`` unless there is one rank below ``world`` for each shard."""
        kinds = [kind.value for kind in ShardingType]
        kernels = [kernel.value for kernel in EmbeddingComputeKernel]
        if self.sharding_type not in kinds or self.compute_kernel not in kernels:
            raise ValueError(
                f"table {name!r}: {self.sharding_type}, {self.compute_kernel} are not torchrec's"
            )
        if (self.columns is None) == (self.sharding_type in COLUMNS_CUT):
            raise ValueError(f"table {name!r}: columns are of column-wise shards, and those have them")
        shards = world if self.sharding_type in EVERYWHERE else 1
        if self.columns is not None:
            shards *= ceil_div(self.shape[1], self.columns)
        if self.sharding_type in BY_HOST:
            shards *= local
        ranks = list(range(world)) if self.ranks == "all" else self.ranks
        if len(ranks) != shards or max(ranks) >= world:
            raise ValueError(f"table {name!r}: ranks={self.ranks} must be {shards} below {world}")
        if self.sharding_type in EVERYWHERE and ranks != list(range(world)):
            raise ValueError(f"table {name!r}: {self.sharding_type} has its shards on all ranks in order")


class PlanDocument(BaseModel):
    """What the file of a plan holds."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["recemb-plan"]
    version: Literal[1]
    world_size: PositiveInt
    local_world_size: PositiveInt
    device: Literal["cpu", "cuda"]
    batch_size: PositiveInt
    tables: dict[str, dict[str, Any]]
    modules: dict[str, dict[str, TableEntry]]
    estimate: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        entries = _all_tables(self.modules)
        if entries.keys() != self.tables.keys():
            raise ValueError("its modules and its tables name different tables")
        for name, entry in entries.items():
            entry.check(name, self.world_size, self.local_world_size)
        return self


def plan_document(planned: Planned, estimate: Mapping[str, Any]) -> PlanDocument:
    """The document of a plan.

    Args:
        planned: with a plan.
        estimate: figures for people; nothing reads them back.
    """
    ranks = planned.request.ranks
    modules: dict[str, dict[str, TableEntry]] = {}
    for option in planned.options:
        modules.setdefault(option.path, {})[option.name] = TableEntry(
            sharding_type=option.sharding_type,
            compute_kernel=option.compute_kernel,
            ranks=_ranks([shard.rank for shard in option.shards], ranks.world_size),
            shape=list(option.tensor.shape),
            columns=option.shards[0].size[1] if option.sharding_type in COLUMNS_CUT else None,
        )
    return PlanDocument(
        format="recemb-plan",
        version=1,
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
        device="cuda" if planned.request.costs.device == "cuda" else "cpu",
        batch_size=planned.request.batch_size,
        tables={table.name: _described(table) for table in planned.request.tables},
        modules=modules,
        estimate=dict(estimate),
    )


def save_plan(path: Path, document: PlanDocument) -> None:
    """Write a plan's document atomically.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        write_json(path, document.model_dump(mode="json", exclude_none=True))
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}; choose another file") from None


def load_plan(
    path: str | Path,
    model: nn.Module | None = None,
    world_size: int | None = None,
    local_world_size: int | None = None,
) -> ShardingPlan:
    """The plan of a file that ``recemb plan --output`` wrote, for ``DistributedModelParallel(plan=...)``.

    A plan of other hosts, as of 1 x 8 ranks for 2 x 4, is taken when its tables are sharded table-wise,
    column-wise, row-wise or data-parallel: these lie on ranks, whatever host a rank is of, and only the
    devices' numbers change. Table-row-wise, table-column-wise and grid shards lie on the ranks of one host:
    such a plan is refused.

    Args:
        model: what is to be sharded. Its collection must have the plan's tables, compressed as planned; the
            plan is given out under that collection's own path. ``None`` skips that check and keeps the path.
        world_size: the ranks there are; ``None`` for the default process group's, unchecked without one.
        local_world_size: those of a host; ``None`` for what the launcher says (``LOCAL_WORLD_SIZE``) with a
            process group, and for the plan's without one.

    Raises:
        ConfigError: a missing or damaged file, a plan of other tables, of another number of ranks, or of
            hosts of another size where that matters.
    """
    document = _read(Path(path))
    if dist.is_available() and dist.is_initialized():
        world_size = dist.get_world_size() if world_size is None else world_size
        local_world_size = get_local_size(world_size) if local_world_size is None else local_world_size
    local = document.local_world_size if local_world_size is None else local_world_size
    if world_size is not None and world_size != document.world_size:
        raise ConfigError(
            f"{path} plans {document.world_size} ranks and there are {world_size}; plan again with "
            f"recemb plan --world_size {world_size}"
        )
    _check_hosts(Path(path), document, local)
    modules = document.modules
    if model is not None:
        modules = {_matching_path(Path(path), document, model): _all_tables(modules)}
    plan = {
        module: EmbeddingModuleShardingPlan(
            {name: _sharding(document, entry, local) for name, entry in tables.items()}
        )
        for module, tables in modules.items()
    }
    return ShardingPlan(plan)


def _check_hosts(path: Path, document: PlanDocument, local: int) -> None:
    """Raise ``ConfigError`` unless the plan is valid with ``local`` ranks on each host."""
    planned = document.local_world_size
    bound = [name for name, own in _all_tables(document.modules).items() if own.sharding_type in WITHIN_HOSTS]
    if local == planned or not bound:
        return
    kind = _all_tables(document.modules)[bound[0]].sharding_type
    more = f" and {len(bound) - 1} more" if len(bound) > 1 else ""
    raise ConfigError(
        f"{path} plans {planned} ranks on each host and there are {local}: table {bound[0]!r}{more} is cut "
        f"{kind} over the ranks of a host; plan again with recemb plan --world_size {document.world_size} "
        f"--local_world_size {local}"
    )


def _sharding(document: PlanDocument, entry: TableEntry, local: int) -> ParameterSharding:
    world, kind = document.world_size, entry.sharding_type
    ranks = list(range(world)) if entry.ranks == "all" else list(entry.ranks)
    spec = None
    if kind != ShardingType.DATA_PARALLEL.value:
        sizes, offsets = calculate_shard_sizes_and_offsets(
            tensor=torch.empty(entry.shape, device="meta"),
            world_size=world,
            local_world_size=local,
            sharding_type=kind,
            col_wise_shard_dim=entry.columns,
        )
        spec = EnumerableShardingSpec(
            [
                ShardMetadata(
                    shard_sizes=size,
                    shard_offsets=offset,
                    placement=placement(document.device, rank, local),
                )
                for size, offset, rank in zip(sizes, offsets, ranks, strict=True)
            ]
        )
    return ParameterSharding(kind, entry.compute_kernel, ranks=ranks, sharding_spec=spec)


def _read(path: Path) -> PlanDocument:
    try:
        return PlanDocument.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); recemb plan --output writes a plan") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path} is not a plan of this recemb: {where + ': ' if where else ''}{first['msg']}; write it "
            f"with recemb plan --output {path}"
        ) from None


def _ranks(ranks: list[int], world_size: int) -> list[int] | Literal["all"]:
    return "all" if len(ranks) > 1 and ranks == list(range(world_size)) else ranks


def _described(table: TableSpec) -> dict[str, Any]:
    return {
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "dtype": table.dtype,
        "compression": str(table.compression),
    }


def _all_tables(modules: Mapping[str, Mapping[str, TableEntry]]) -> dict[str, TableEntry]:
    return {name: entry for tables in modules.values() for name, entry in tables.items()}


def _matching_path(path: Path, document: PlanDocument, model: nn.Module) -> str:
    """Where ``model`` keeps the plan's tables."""
    planned = document.tables
    differences = [f"the model has no EmbeddingBagCollection with a table of {sorted(planned)[:3]}"]
    for name, module in model.named_modules():
        if not isinstance(module, TorchrecEmbeddingBagCollection):
            continue
        found = {config.name: _described(table_spec(config)) for config in module.embedding_bag_configs()}
        if found == planned:
            _check_shapes(path, _all_tables(document.modules), module)
            return str(name)
        if found.keys() & planned.keys():
            differences = _differences(planned, found)
    shown = "\n  ".join(differences[:5])
    more = f"\n  ... and {len(differences) - 5} more" if len(differences) > 5 else ""
    raise ConfigError(
        f"{path} plans other tables than the model's; plan again for this model:\n  {shown}{more}"
    )


def _check_shapes(path: Path, entries: Mapping[str, TableEntry], module: nn.Module) -> None:
    """Raise ``ConfigError`` unless torchrec plans weights of the planned shapes for ``module``."""
    for sharder in get_sharders():
        if sharder.module_type is not type(module):
            continue
        for name, weight in sharder.shardable_parameters(module).items():
            planned, own = entries[name].shape, list(weight.shape)
            if planned != own:
                raise ConfigError(
                    f"{path}: the shape of table {name!r} is {planned} in the plan, {own} in the model; plan "
                    "again for this model"
                )


def _differences(planned: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    lines = [f"table {name!r} is only in the plan" for name in planned.keys() - found.keys()]
    lines += [f"table {name!r} is only in the model" for name in found.keys() - planned.keys()]
    for name in planned.keys() & found.keys():
        given, own = planned[name], found[name]
        if given != own and isinstance(given, dict):
            keys = [key for key in own if given.get(key) != own[key]]
            lines += [
                f"table {name!r}: {key} is {given.get(key)} in the plan, {own[key]} in the model"
                for key in keys
            ]
    return sorted(lines)
