"""One of two gloo ranks: shards the mixed model by a plan file, and compares a step with the whole model."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from recemb.torchrec_io import get_sharders, load_plan, planner
from tests.torchrec_io.planning.models import MIXED, ROWS, Model


def main(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(1)
    whole = Model(MIXED, "cpu")
    weights = whole.state_dict()
    model = Model(MIXED)
    plan = load_plan(folder / "plan.json", model)
    # The same as planning on all ranks at once, which needs the process group.
    planner(batch_size=8).collective_plan(Model(MIXED), get_sharders(), dist.group.WORLD)
    sharded = DistributedModelParallel(model, plan=plan, sharders=get_sharders(), device=torch.device("cpu"))
    own = sharded.state_dict()
    for name, value in own.items():
        full = weights[name]
        if hasattr(value, "local_shards"):
            for shard in value.local_shards():
                (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                shard.tensor.copy_(full[row : row + rows, column : column + columns])
        else:
            value.copy_(full)
    generator = torch.Generator().manual_seed(rank)
    lengths = torch.randint(0, 4, (len(ROWS) * 8,), generator=generator)
    values = torch.cat(
        [
            torch.randint(0, rows, (int(lengths[k * 8 : (k + 1) * 8].sum()),), generator=generator)
            for k, rows in enumerate(ROWS.values())
        ]
    )
    batch = KeyedJaggedTensor(keys=list(ROWS), values=values, lengths=lengths)
    expected, found = whole.ebc(batch).to_dict(), sharded.module.ebc(batch).to_dict()
    for name in ROWS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    sum(found[name].sum() for name in ROWS).backward()
    print(f"rank {rank} agrees", flush=True)
    dist.destroy_process_group()
    # Threads of a process group may abort an interpreter that ends, exit code and all (pytorch #179291).
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
