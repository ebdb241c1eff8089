"""Plan a list of tables without a model, a GPU or processes, and keep what a report needs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    ShardingOption,
    Topology,
)
from torchrec.distributed.types import PipelineType, ShardingPlan
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recemb.errors import ConfigError
from recemb.planner.costs import Costs
from recemb.planner.layout import Cluster, prune
from recemb.planner.search import Found
from recemb.spec import TableSpec
from recemb.torchrec_io.configs import to_configs
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection
from recemb.torchrec_io.planning.planner import planner, topology
from recemb.torchrec_io.planning.search import PlanProposer, cluster_of, units_of
from recemb.torchrec_io.sharding.placement import check_plan
from recemb.torchrec_io.sharding.sharder import get_sharders
from recemb.torchrec_io.sharding.tables import CompressedTables

# Where torchrec's DLRM keeps its tables, and so recemb train's models.
MODULE_PATH = "sparse_arch.embedding_bag_collection"
OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = MappingProxyType(
    {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rowwise_adagrad": RowWiseAdagrad,
        "adam": torch.optim.Adam,
    }
)


@dataclass(frozen=True)
class Ranks:
    """The cluster that is planned for.

    Attributes:
        local_world_size: ranks of a host, which divide ``world_size``.
        hbm, ddr: bytes of a rank.
        reserved: part of them that is left free for everything but tables.
    """

    world_size: int
    local_world_size: int
    hbm: int
    ddr: int
    reserved: float


@dataclass(frozen=True)
class Request:
    """What to plan.

    Attributes:
        tables: with their compressions.
        pooling_factors: mean ids a sample, of each table.
        batch_size: samples of a rank's batch.
        optimizer: of the tables; a key of :data:`OPTIMIZERS`.
    """

    tables: tuple[TableSpec, ...]
    pooling_factors: tuple[float, ...]
    batch_size: int
    optimizer: str
    ranks: Ranks
    costs: Costs


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan, or why there is none.

    Attributes:
        plan: torchrec's, or ``None`` when none fits.
        options: the chosen option of each table, ranks filled in; empty without a plan.
        search_space: all options of all tables.
        found: the search's outcome.
        cluster: the ranks, with the storage that tables may take.
        workspace: bytes of each rank that looking compressed tables up takes.
        seconds: that planning took.
    """

    request: Request
    plan: ShardingPlan | None
    options: Sequence[ShardingOption]
    search_space: Sequence[ShardingOption]
    found: Found
    cluster: Cluster
    workspace: int
    seconds: float


def plan_tables(request: Request) -> Planned:
    """Plan by :func:`recemb.torchrec_io.planner`; a model that does not fit is not an error here.

    Raises:
        ConfigError: no tables, or one that cannot be sharded.
    """
    started = time.perf_counter()
    made, model = _prepared(request)
    plan: ShardingPlan | None = None
    with _quiet():
        try:
            plan = made.plan(model, get_sharders())
        except PlannerError:
            plan = None
    (proposer,) = made._proposers
    assert isinstance(proposer, PlanProposer)
    assert proposer.found is not None
    if plan is not None:
        collection = model.get_submodule(MODULE_PATH)
        assert isinstance(collection, EmbeddingBagCollection)
        ours = CompressedTables.of(collection, torch.device(request.costs.device))
        names = [table.name for table in request.tables]
        check_plan(ours, names, plan.plan[MODULE_PATH], request.ranks.world_size)
    reservation = made._storage_reservation
    return Planned(
        request,
        plan,
        made._best_plan if plan is not None else (),
        made._enumerator.last_stored_search_space,
        proposer.found,
        cluster_of(reservation.last_reserved_topology),
        reservation.workspace,
        time.perf_counter() - started,
    )


class Layouts:
    """What a request's tables could be laid out as, to see whether they fit without looking for a plan.

    Args:
        request: what would be planned.

    Attributes:
        units: without dominated options.

    Raises:
        ConfigError: as :func:`plan_tables`.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._made, self._model = _prepared(request)
        with _quiet():
            space = self._made._enumerator.enumerate(self._model, get_sharders())
        self.units = [prune(unit) for unit in units_of(space)]

    def cluster(self, hbm: int | None = None, ddr: int | None = None) -> Cluster:
        """The request's ranks, or equally many of other storage, with what tables may take of it.

        Args:
            hbm, ddr: bytes of a rank; ``None`` for the request's. Neither changes how long a layout takes.
        """
        ranks = self._request.ranks
        asked = replace(ranks, hbm=hbm or ranks.hbm, ddr=ddr or ranks.ddr)
        reservation = self._made._storage_reservation
        reserved = reservation.reserve(
            topology=_topology(replace(self._request, ranks=asked)),
            batch_size=self._request.batch_size,
            module=self._model,
            sharders=get_sharders(),
            constraints=self._made._constraints,
        )
        return cluster_of(reserved)


def _prepared(request: Request) -> tuple[EmbeddingShardingPlanner, nn.Module]:
    """The planner of a request, and the model that it plans."""
    if not request.tables:
        raise ConfigError("there are no tables to plan; give a Request one at least")
    made = planner(
        _topology(request),
        request.batch_size,
        {
            table.name: ParameterConstraints(pooling_factors=[float(factor)] * len(table.feature_names))
            for table, factor in zip(request.tables, request.pooling_factors, strict=True)
        },
        FixedPercentageStorageReservation(request.ranks.reserved),
        costs=request.costs,
        pipeline_type=PipelineType.NONE,
    )
    return made, _model(request)


def _topology(request: Request) -> Topology:
    ranks = request.ranks
    return topology(ranks.world_size, request.costs, ranks.local_world_size, ranks.hbm, ranks.ddr)


def _model(request: Request) -> nn.Module:
    """The tables on ``meta`` where DLRM keeps them, marked with their optimizer."""
    collection = EmbeddingBagCollection(tables=to_configs(request.tables), device=torch.device("meta"))
    for parameter in collection.parameters():
        # All that planners read of apply_optimizer_in_backward.
        parameter._optimizer_classes = [OPTIMIZERS[request.optimizer]]
        parameter._optimizer_kwargs = [{}]
    model = nn.Module()
    inner = model
    *path, last = MODULE_PATH.split(".")
    for name in path:
        child = nn.Module()
        inner.add_module(name, child)
        inner = child
    inner.add_module(last, collection)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchrec's warning that a data-parallel table has no sharding spec, one line for each."""
    root = logging.getLogger()

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Sharding spec not found for ")

    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)
