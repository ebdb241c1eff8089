"""``recemb.torchrec_io.planner``: torchrec's planner for models with compressed tables."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torchrec.distributed.comm import get_local_size, get_topology_domain_multiple
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    Stats,
    StorageReservation,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import PipelineType
from torchrec.distributed.utils import get_device_type

from recemb.planner.costs import Costs, default_costs
from recemb.torchrec_io.planning.enumerator import PlanEnumerator
from recemb.torchrec_io.planning.estimators import (
    Compressed,
    PerfEstimator,
    StorageEstimator,
    WorkspaceReservation,
)
from recemb.torchrec_io.planning.search import PlanPartitioner, PlanProposer, SlowestRank

# torchrec's default of HeuristicalStorageReservation: for dense layers, activations and fragmentation.
RESERVED = 0.15


def topology(
    world_size: int,
    costs: Costs,
    local_world_size: int | None = None,
    hbm: int | None = None,
    ddr: int | None = None,
) -> Topology:
    """Equal ranks, with the bandwidths of ``costs``; needs no GPU and no process group.

    Args:
        world_size: ranks.
        local_world_size: ranks of a host; ``None`` for all.
        hbm, ddr: bytes of a rank; ``None`` for torchrec's defaults, 32 and 128 GiB.
    """
    # torchrec counts in bytes a millisecond.
    per_ms = {name: costs[f"{name}_bandwidth"] / 1e3 for name in ("hbm", "ddr", "hbm_to_ddr")}
    made: Topology = TopologyFactory.create_topology(
        TrainerConfig(
            world_size=world_size,
            local_world_size=local_world_size or world_size,
            hbm_cap_bytes=hbm,
            ddr_cap_bytes=ddr,
        ),
        HardwareConfig(
            hbm_mem_bw=per_ms["hbm"],
            ddr_mem_bw=per_ms["ddr"],
            hbm_to_ddr_mem_bw=per_ms["hbm_to_ddr"],
            intra_host_bw=costs["intra_host_bandwidth"] / 1e3,
            inter_host_bw=costs["inter_host_bandwidth"] / 1e3,
        ),
        KernelConfig(
            compute_device=costs.device,
            bwd_compute_multiplier=costs["backward_factor"],
            use_hardware_based_bandwidth=True,
        ),
    )
    return made


def planner(
    topology: Topology | None = None,
    batch_size: int | None = None,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    storage_reservation: StorageReservation | None = None,
    *,
    costs: Costs | None = None,
    pipeline_type: PipelineType = PipelineType.NONE,
    stats: Stats | list[Stats] | None = None,
    debug: bool = False,
) -> EmbeddingShardingPlanner:
    """torchrec's planner, for models with compressed tables and clusters of hundreds of ranks.

    Compressed tables get the sharding types that recemb can run, tables of one ROBE array one rank or all of
    them, and costs by method. The plan is that of :func:`recemb.planner.search.search`.

    Args:
        topology: the ranks; ``None`` for those of the default process group.
        batch_size: samples of a rank's batch; ``None`` for torchrec's default, 512.
        constraints: by table name, as for torchrec's planner.
        storage_reservation: ``None`` keeps 15 % of every rank's storage free; the workspace of compressed
            tables is kept free besides.
        costs: constants of compressed tables; ``None`` for those of the topology's device that come along.
        pipeline_type: whose batches in flight are counted.
        stats, debug: torchrec's; nothing is logged unless asked for.

    Example::

        plan = planner(batch_size=512).collective_plan(model, get_sharders(), dist.GroupMember.WORLD)
        model = DistributedModelParallel(model, plan=plan, sharders=get_sharders())
    """
    if topology is None:
        topology = Topology(
            local_world_size=get_local_size(),
            world_size=dist.get_world_size(),
            compute_device=get_device_type(),
            pod_size=get_topology_domain_multiple(),
        )
    limits = dict(constraints or {})
    compressed = Compressed(topology.compute_device)
    estimators = [
        PerfEstimator(
            topology,
            limits,
            costs=costs or default_costs(topology.compute_device),
            compressed=compressed,
        ),
        StorageEstimator(topology, limits, pipeline_type, compressed=compressed),
    ]
    proposer = PlanProposer()
    samples = batch_size or BATCH_SIZE
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=samples,
        enumerator=PlanEnumerator(topology, samples, limits, estimators, compressed),
        storage_reservation=WorkspaceReservation(
            storage_reservation or FixedPercentageStorageReservation(RESERVED), compressed
        ),
        proposer=proposer,
        partitioner=PlanPartitioner(),
        performance_model=SlowestRank(topology, proposer),
        stats=[] if stats is None else stats,
        constraints=limits,
        debug=debug,
    )
