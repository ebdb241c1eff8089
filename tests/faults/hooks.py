"""Faults that a rank does to itself, at a place in its training."""

from __future__ import annotations

import errno
import gc
import os
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)

from recemb.cache.streams import Streams
from recemb.checkpoint import load, save, shard_file
from recemb.errors import DataError, NonFiniteError
from recemb.spec import Dense, TableSpec
from recemb.torchrec_io import EmbeddingBagCollectionSharder
from recemb.training import distributed, loop, run, sharded, table_step
from recemb.training.state import TrainerState


def install(
    action: str | None = None, place: str = "read", step: int = 0, mark: str = "", plan: str | None = None
) -> None:
    """Do ``action`` when the training step after ``step`` steps reaches ``place``.

    Args:
        action: a name below, or ``None`` for none.
        place: ``read`` (the batch), ``forward``, ``backward`` (of the tables), ``save`` (a checkpoint),
            ``poll`` (of a GPU's verdicts, before that) or ``fill`` (from a checkpoint).
        step: which step.
        mark: a file that is written just before, with the time of ``time.monotonic``.
        plan: torchrec's sharding type of uncompressed tables, and ``data_parallel`` of all; ``None`` for the
            default plan.
    """
    if plan is not None:
        _plan(plan)
    if action is None:
        return
    if action in _AT_START:
        _AT_START[action]()
        return
    act = _ACTIONS[action]
    # Not the trainers themselves: they would keep the process group.
    made: list[weakref.ref[loop.Trainer]] = []

    def due() -> None:
        trainer = made[-1]() if made else None
        if trainer is not None and trainer.outcome.steps == step:
            if mark:
                Path(mark).write_text(str(time.monotonic()))
            act()

    original = loop.Trainer.__init__

    def remember(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        made.append(weakref.ref(self))

    loop.Trainer.__init__ = remember  # type: ignore[method-assign]
    owner, name = {
        "read": (loop, "check_inputs"),
        "forward": (loop.Trainer, "_logits"),
        "loss": (loop, "check_loss"),
        "backward": (table_step.ShardedTableStep, "backward"),
        "save": (shard_file, "write"),
        "poll": (save, "poll"),
        "fill": (load.Checkpoint, "_fill"),
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


def _refused_row() -> None:
    raise NonFiniteError("table 't_cat_3': a row is NaN or infinite")


def _no_memory() -> None:
    raise MemoryError("no host memory")


def _cuda_error() -> None:
    raise RuntimeError("CUDA error: out of memory; NCCL error: connection")


def _disk_error(number: int) -> None:
    raise OSError(number, os.strerror(number))


def _overflow() -> None:
    original = loop.binary_cross_entropy_with_logits
    loop.binary_cross_entropy_with_logits = lambda *args, **named: original(*args, **named) * torch.inf


def _spoil_caches() -> None:
    original = Streams.begin

    def begin(self: Streams, tables: Any) -> bool:
        for f in self.firsts:
            tables[f].cache.weight.data.fill_(torch.nan)
        return original(self, tables)

    Streams.begin = begin  # type: ignore[method-assign]


def _other_plan() -> None:
    original = sharded.default_plan

    def plan(tables: Any, collection: Any, world_size: int, local_size: int) -> Any:
        found = original(tables, collection, world_size, local_size)
        found["t_cat_3"].ranks = [1 - found["t_cat_3"].ranks[0]]
        return found

    sharded.default_plan = plan


def _plan(kind: str) -> None:
    ways = {
        "data_parallel": data_parallel,
        "row_wise": lambda: row_wise(compute_kernel="fused"),
        "column_wise": lambda: column_wise(ranks=[0, 1], compute_kernel="fused"),
    }

    def way(number: int, table: TableSpec) -> Any:
        if kind == "data_parallel" or isinstance(table.compression, Dense):
            return ways[kind]()
        return table_wise(number % 2, compute_kernel="fused")

    def plan(tables: Any, collection: Any, world_size: int, local_size: int) -> Any:
        return construct_module_sharding_plan(
            collection,
            {table.name: way(number, table) for number, table in enumerate(tables.tables)},
            sharder=EmbeddingBagCollectionSharder(),
            local_size=local_size,
            world_size=world_size,
            device_type="cpu",
        )

    sharded.default_plan = plan


def _count_left_over() -> None:
    """Print the bytes of the whole model's tables and of their optimizers that outlive its sharding."""
    left: dict[str, weakref.ref[Any]] = {}
    numbers: dict[str, int] = {}
    shard, build = sharded.shard_model, run.build_sharded

    def watch(name: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        left[name], numbers[name] = weakref.ref(storage), storage.nbytes()

    def shard_model(model: Any, *args: Any) -> Any:
        _, collection = sharded.find_collection(model)
        for name, tensor in collection.state_dict(keep_vars=True).items():
            watch(name, tensor)
            for optimizer in getattr(tensor, "_in_backward_optimizers", ()):
                for key, value in optimizer.state[tensor].items():
                    watch(f"{name}.{key}", value)
        return shard(model, *args)

    def build_sharded(*args: Any) -> Any:
        made = build(*args)
        # Modules and their optimizers refer to each other; what is left then is never freed.
        gc.collect()
        kept = {name: numbers[name] for name, storage in left.items() if storage() is not None}
        print(f"of {sum(numbers.values())} bytes in {len(numbers)} tensors are left over: {kept}")
        return made

    sharded.shard_model, run.build_sharded = shard_model, build_sharded


def _save_again() -> None:
    """Save what is restored beside it, in the folder ``again``."""
    original = TrainerState.restore

    def restore(self: Any) -> Any:
        found = original(self)
        root, step = self._root, self.saved_step
        self._root = root / "again"
        self.save()
        self._root, self.saved_step = root, step
        return found

    # For good: the process is a fork that ends with its run.
    TrainerState.restore = restore


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
    "refused_row": _refused_row,
    "no_memory": _no_memory,
    "cuda_error": _cuda_error,
    "disk_full": lambda: _disk_error(errno.ENOSPC),
    "bad_disk": lambda: _disk_error(errno.EIO),
    "overflow": _overflow,
    "spoil_caches": _spoil_caches,
}
_AT_START: dict[str, Callable[[], None]] = {
    "other_plan": _other_plan,
    "other_data": _other_data,
    "save_again": _save_again,
    "count_left_over": _count_left_over,
    # As torchrun terminates the ranks that are left, here just as this one is about to say why it ends.
    "terminated_when_lost": lambda: _before(distributed.World, "_lost", _ACTIONS["terminate"]),
    "killed_in_building": lambda: _before(run, "_build", _ACTIONS["kill"]),
}
