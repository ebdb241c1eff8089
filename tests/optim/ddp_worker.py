"""One rank of collections under DistributedDataParallel, with optimizers attached, against one process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torchrec import KeyedJaggedTensor

from recemb import EmbeddingBagCollection
from tests.optim.test_fused_update import COMPRESSIONS, _collection
from tests.sharding.shared import Found, join, run_all

SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.5},
    "Adagrad": {"lr": 0.05, "eps": 1e-3},
    "Adam": {"lr": 0.02, "eps": 1e-3},
}
STEPS, BATCH = 4, 16


@dataclass(frozen=True)
class Case:
    method: str
    optimizer: str = "SGD"
    find_unused: bool = True

    def __str__(self) -> str:
        return f"{self.method}-{self.optimizer}{'' if self.find_unused else '-all_used'}"


CASES = [
    *map(Case, COMPRESSIONS),
    Case("tt", find_unused=False),
    Case("dense", find_unused=False),
    *(Case(method, optimizer) for method in ("tt", "md") for optimizer in ("Adagrad", "Adam")),
]


class Model(nn.Module):
    """Tables, and a layer over them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.ebc: EmbeddingBagCollection = _collection(COMPRESSIONS[case.method])
        self.layer = nn.Linear(3 * 16, 1)
        kind = getattr(torch.optim, case.optimizer)
        apply_optimizer_in_backward(kind, self.ebc.parameters(), dict(SETTINGS[case.optimizer]))

    def forward(self, batch: KeyedJaggedTensor) -> Tensor:
        return (self.layer(self.ebc(batch).values()) - 1).square().mean()


class _Stream:
    def wait_stream(self, other: object) -> None:
        """There is no accelerator to wait for."""


def batches(world: int) -> list[list[KeyedJaggedTensor]]:
    """Of each step, one for each rank and at last the whole."""
    generator, every = torch.Generator().manual_seed(3), []
    for _ in range(STEPS):
        lengths = torch.randint(0, 3, (world, 3, BATCH), generator=generator)
        bags = [
            [[torch.randint(0, 30, (int(n),), generator=generator) for n in feature] for feature in rank]
            for rank in lengths
        ]
        own = [made(lengths[rank], bags[rank]) for rank in range(world)]
        together = [[bag for rank in bags for bag in rank[feature]] for feature in range(3)]
        every.append([*own, made(lengths.transpose(0, 1).reshape(3, -1), together)])
    return every


def made(lengths: Tensor, bags: list[list[Tensor]]) -> KeyedJaggedTensor:
    values = torch.cat([bag for feature in bags for bag in feature])
    return KeyedJaggedTensor(keys=["a", "b", "c"], values=values, lengths=lengths.flatten())


def trained(rank: int, world: int, case: Case) -> Found:
    model, whole = Model(case), Model(case)
    start = flat(model)
    # DDP asks an accelerator for its stream in the backward.
    with patch.object(torch.accelerator, "current_stream", lambda *_: _Stream()):
        replica = DistributedDataParallel(model, find_unused_parameters=case.find_unused)
        for step in batches(world):
            replica(step[rank]).backward()
            whole(step[-1]).backward()
    every = [torch.empty_like(start) for _ in range(world)]
    dist.all_gather(every, flat(model))
    return {
        "apart": far(*every),
        "moved": far(start, flat(model)),
        "off": far(flat(whole), flat(model)),
        "left": [name for name, parameter in model.ebc.named_parameters() if parameter.grad is not None],
    }


def flat(model: Model) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.ebc.parameters()])


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def main(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    run_all(rank, folder, {str(case): partial(trained, rank, world, case) for case in CASES})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
