"""Faults that a rank does to itself, at a place in its training."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel

from recemb.cache.streams import Streams
from recemb.checkpoint import shard_file
from recemb.errors import DataError
from recemb.torchrec_io import EmbeddingBagCollectionSharder
from recemb.training import loop, run, sharded, table_step


def install(action: str | None = None, place: str = "read", step: int = 0, mark: str = "") -> None:
    """Do ``action`` when the training step after ``step`` steps reaches ``place``.

    Args:
        action: a name below, or ``None`` for none.
        place: ``read`` (the batch), ``forward``, ``backward`` (of the tables) or ``save`` (a checkpoint).
        step: which step.
        mark: a file that is written just before, with the time of ``time.monotonic``.
    """
    if action is None:
        return
    if action in _AT_START:
        _AT_START[action]()
        return
    act = _ACTIONS[action]
    state: dict[str, Any] = {"trainer": None}

    def due() -> None:
        trainer = state["trainer"]
        if trainer is not None and trainer.outcome.steps == step:
            if mark:
                Path(mark).write_text(str(time.monotonic()))
            act()

    original = loop.Trainer.__init__

    def remember(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        state["trainer"] = self

    loop.Trainer.__init__ = remember  # type: ignore[method-assign]
    owner, name = {
        "read": (loop, "check_inputs"),
        "forward": (loop.Trainer, "_logits"),
        "loss": (loop, "check_loss"),
        "backward": (table_step.ShardedTableStep, "backward"),
        "save": (shard_file, "write"),
    }[place]
    _before(owner, name, due)


def _before(owner: Any, name: str, first: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **named: Any) -> Any:
        first()
        return original(*args, **named)

    setattr(owner, name, patched)


def _data_error() -> None:
    raise DataError("part-00000.parquet: column label, row 7: 2 is neither 0 nor 1")


def _defect() -> None:
    raise KeyError("a defect of the program")


def _overflow() -> None:
    original = loop.binary_cross_entropy_with_logits
    loop.binary_cross_entropy_with_logits = lambda *args, **named: original(*args, **named) * torch.inf


def _spoil_caches() -> None:
    original = Streams.begin

    def begin(self: Streams, tables: Any) -> bool:
        for name in self.names:
            tables[name].cache.weight.data.fill_(torch.nan)
        return original(self, tables)

    Streams.begin = begin  # type: ignore[method-assign]


def _other_plan() -> None:
    original = sharded.default_plan

    def plan(tables: Any, collection: Any, world_size: int, local_size: int) -> Any:
        found = original(tables, collection, world_size, local_size)
        found["t_cat_3"].ranks = [1 - found["t_cat_3"].ranks[0]]
        return found

    sharded.default_plan = plan


def _replicate() -> None:
    def plan(tables: Any, collection: Any, world_size: int, local_size: int) -> Any:
        return construct_module_sharding_plan(
            collection,
            {table.name: data_parallel() for table in tables.tables},
            sharder=EmbeddingBagCollectionSharder(),
            local_size=local_size,
            world_size=world_size,
            device_type="cpu",
        )

    sharded.default_plan = plan


def _other_data() -> None:
    original = run.fingerprint
    run.fingerprint = lambda log: original(log)[::-1]


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "linger": lambda: time.sleep(60),
    "data_error": _data_error,
    "defect": _defect,
    "overflow": _overflow,
    "spoil_caches": _spoil_caches,
}
_AT_START: dict[str, Callable[[], None]] = {
    "other_plan": _other_plan,
    "other_data": _other_data,
    "replicate": _replicate,
}
