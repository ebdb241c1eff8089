"""One of four gloo ranks: saves and loads in all groups, then one of them is killed in a save."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recemb.checkpoint import latest_checkpoint, save_checkpoint, shard_file
from recemb.errors import CheckpointError
from tests.checkpoint.ranks import bits, local, sharded
from tests.checkpoint.test_resharding import LAYOUTS, table

WORLD = 4
KILLED = 3
TIMEOUT = timedelta(seconds=30)


def state(full: Tensor, world: int, rank: int, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """The same table in every layout, a replicated layer, and what one rank alone holds."""
    shards = {name: sharded(full, layout(world), rank, group) for name, layout in LAYOUTS.items()}
    own = {"own": full[0].clone()} if rank == world - 1 else {}
    return {"model": shards | {"over.weight": full[:3].clone()} | own, "lr": float(full[0, 0])}


def is_loaded(found: dict[str, Any], full: Tensor) -> bool:
    model = found["model"]
    parts = [part for name in LAYOUTS for part in local(model[name])]
    parts += [(slice(0, 3), model["over.weight"])] + ([(0, model["own"])] if "own" in model else [])
    return found["lr"] == float(full[0, 0]) and all(bits(part) == bits(full[at]) for at, part in parts)


def main(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=TIMEOUT)
    groups = {4: None, 2: dist.new_group([0, 1], timeout=TIMEOUT), 1: dist.new_group([0], timeout=TIMEOUT)}
    full, found = table(), {}
    for saves, saving in groups.items():
        root = folder / f"by{saves}"
        if rank < saves:
            save_checkpoint(root, 1, state(full, saves, rank, saving), {"saved by": saves}, group=saving)
        dist.barrier()
        for loads, loading in groups.items():
            if rank < loads:
                mine = state(torch.zeros_like(full), loads, rank, loading)
                checkpoint = latest_checkpoint(root, group=loading)
                assert checkpoint is not None
                assert checkpoint.extra == {"saved by": saves}
                checkpoint.load(mine)
                found[f"{saves} -> {loads}"] = is_loaded(mine, full)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    if rank == KILLED:
        shard_file.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[attr-defined]
    start = time.monotonic()
    try:
        save_checkpoint(folder / "by4", 2, state(full + 1, WORLD, rank, None), {})
    except (RuntimeError, CheckpointError) as error:
        lost = {"error": str(error), "seconds": time.monotonic() - start}
        (folder / f"lost{rank}.json").write_text(json.dumps(lost))
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
