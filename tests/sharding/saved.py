"""Checkpoints of sharded models: under other plans, and from one to two to four ranks and back to one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from recemb.checkpoint import latest_checkpoint, save_checkpoint
from tests.sharding.cases import STEPS, Model, batch, collection
from tests.sharding.places import COMPRESSED, Case
from tests.sharding.shared import Found, dense_optimizer, differences, sharded

FORMATS = ("dcp", "own")


def save(kind: str, folder: Path, state: dict[str, Any]) -> None:
    """Through torch.distributed.checkpoint, or in recemb's own format."""
    if kind == "dcp":
        dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    else:
        save_checkpoint(folder, 1, state, {})


def load(kind: str, folder: Path, state: dict[str, Any]) -> None:
    """Into the tensors of ``state``, which may be a part of what was saved."""
    if kind == "dcp":
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        return
    found = latest_checkpoint(folder)
    assert found is not None
    found.load(state, ignore_unexpected=True)


def resharded(kind: str, world: int, folder: Path) -> Found:
    """What half as many ranks saved, loaded under another plan, and saved for twice as many."""
    case = Case("row_wise" if world == 2 else "four", "sum", "rowwise_adagrad", world)
    model = sharded(case, {})
    optimizer = model.fused_optimizer
    # fbgemm names the state of uncompressed tables in its own way, which an unsharded module does not know.
    known = of_compressed if world == 2 else dict
    state = {"model": model.state_dict(), "optimizer": known(optimizer.state_dict()["state"])}
    expected = torch.load(folder.parent / "reference.pt", weights_only=True)
    fresh = differences(state["model"], expected["model"])
    load(kind, folder.parent / f"{kind}{world // 2}", state)
    model.load_state_dict(dict(state["model"]))
    optimizer.load_state_dict({"state": optimizer.state_dict()["state"] | state["optimizer"]})
    found = optimizer.state_dict()["state"]
    save(kind, folder.parent / f"{kind}{world}", {"model": model.state_dict(), "optimizer": found})
    return {
        "weights": differences(model.state_dict(), expected["model"]),
        "fresh": {key: by for key, by in fresh.items() if "embedding_bags" in key},
        "state": {
            f"{key}.{name}": difference
            for key, own in of_compressed(found).items()
            for name, difference in differences(own, expected["optimizer"][key]).items()
        },
    }


def of_compressed(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer state of compressed tables."""
    return {key: value for key, value in state.items() if key.split(".")[2] in COMPRESSED}


def other_plan(rank: int, folder: Path) -> Found:
    """Saved in recemb's own format under one plan; loaded under another, and without any."""
    saved = Case("table_wise", "sum", "rowwise_adagrad")
    other = Case("empty_rank", "sum", "rowwise_adagrad")

    def built(case: Case) -> tuple[DistributedModelParallel, CombinedOptimizer]:
        model = sharded(case, start)
        return model, CombinedOptimizer([("", model.fused_optimizer), ("", dense_optimizer(model))])

    def train(model: DistributedModelParallel, optimizer: CombinedOptimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(batch(10 * step + rank, saved))[0].backward()
            optimizer.step()

    start = {key: value.clone() for key, value in Model(collection(saved)).state_dict().items()}
    model, optimizer = built(saved)
    train(model, optimizer, range(STEPS))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(folder / "checkpoints", STEPS, state, {})
    found = latest_checkpoint(folder / "checkpoints")
    assert found is not None
    moved, resumed = built(other)
    state = {"model": moved.state_dict(), "optimizer": resumed.state_dict()}
    found.load(state)
    moved.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    alone = Model(collection(saved))
    whole = {"model": alone.state_dict()}
    found.load(whole, ignore_unexpected=True)
    loaded = differences(moved.state_dict(), whole["model"])
    same = differences(model.state_dict(), whole["model"])
    forgetful = built(other)
    forgetful[0].load_state_dict(moved.state_dict())
    for pair in ((model, optimizer), (moved, resumed), forgetful):
        train(*pair, range(STEPS, 2 * STEPS))
    save_checkpoint(folder / "checkpoints", 2 * STEPS, {"model": model.state_dict()}, {})
    found = latest_checkpoint(folder / "checkpoints")
    assert found is not None
    found.load(whole)
    return {
        "saved": same,
        "loaded": loaded,
        "trained": differences(moved.state_dict(), whole["model"]),
        "forgetful": differences(forgetful[0].state_dict(), whole["model"]),
        "optimizer": sorted(optimizer.state_dict()["state"]),
    }
