"""F18, F32: training that is saved and resumed equals training that was not interrupted, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor

from recemb import (
    ROBE,
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    HotRows,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)
from recemb.cache import refresh as refresh_module
from recemb.cache.hot_rows import HotRowCache
from recemb.checkpoint import latest_checkpoint, save_checkpoint
from tests.checkpoint.ranks import same

HOT = HotRows(rows=6, warmup=1, refresh_every=2, track_every=1, decay=0.5)
TABLES = {
    "tt": TensorTrain(rank=8, cache=HOT),
    "qr": QuotientRemainder(collisions=6, cache=HOT),
    "robe_a": ROBE(compress_rate=4, block_size=8),
    "robe_b": ROBE(compress_rate=4, block_size=8),
    "md": MixedDimension(dim=3, cache=HOT),
    "dense": Dense(),
}
ROWS, BATCH = 90, 16
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "adam": (torch.optim.Adam, {"lr": 0.02}),
}


class Run:
    """Cached and plain tables, their optimizers in the backward, Adam for the rest, and dropout."""

    def __init__(self, optimizer: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.ebc = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=ROWS,
                    embedding_dim=8,
                    feature_names=[f"f_{name}"],
                    compression=compression,
                )
                for name, compression in TABLES.items()
            ]
        )
        self.over = nn.Sequential(nn.Linear(8 * len(TABLES), 4), nn.Dropout(0.5))
        kind, options = OPTIMIZERS[optimizer]
        apply_optimizer_in_backward(kind, self.ebc.parameters(), dict(options))
        self.dense = torch.optim.Adam(self.over.parameters(), lr=0.01)
        self.position = 0

    def step(self) -> None:
        generator = torch.Generator().manual_seed(self.position)
        lengths = torch.randint(0, 4, (BATCH * len(TABLES),), generator=generator)
        ids = torch.randint(0, ROWS // 3, (int(lengths.sum()),), generator=generator)
        features = KeyedJaggedTensor([f"f_{name}" for name in TABLES], ids, lengths=lengths)
        self.dense.zero_grad()
        self.over(self.ebc(features).values()).square().sum().backward()
        self.dense.step()
        for group in self.dense.param_groups:
            group["lr"] *= 0.9
        self.position += 1

    def state(self) -> dict[str, Any]:
        return {
            "model": {**self.ebc.state_dict(prefix="ebc."), **self.over.state_dict(prefix="over.")},
            "tables": self.ebc.fused_optimizer.state_dict(),
            "dense": self.dense.state_dict(),
        }

    def save(self, root: Path) -> None:
        extra = {"position": self.position, "rng": torch.get_rng_state().tolist()}
        save_checkpoint(root, self.position, self.state(), extra)

    def load(self, root: Path) -> None:
        found = latest_checkpoint(root)
        assert found is not None
        # Adam makes its state as it first steps.
        self.over(torch.zeros(1, 8 * len(TABLES))).sum().backward()
        self.dense.step()
        state = self.state()
        found.load(state)
        self.ebc.fused_optimizer.load_state_dict(state["tables"])
        self.dense.load_state_dict(state["dense"])
        self.position = found.extra["position"]
        torch.set_rng_state(torch.tensor(found.extra["rng"], dtype=torch.uint8))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_f32_resumed_training_equals_unbroken_training(optimizer: str, tmp_path: Path) -> None:
    straight = Run(optimizer, seed=0)
    for _ in range(7):
        straight.step()
    straight.save(tmp_path)
    saved = copy.deepcopy(straight.state())
    for _ in range(6):
        straight.step()
    resumed = Run(optimizer, seed=1)
    resumed.load(tmp_path)
    assert same(resumed.state(), saved)
    for _ in range(6):
        resumed.step()
    assert resumed.position == straight.position
    assert same(resumed.state(), straight.state())
    # What was loaded has mattered: the weights have moved on.
    assert not same(straight.state()["model"], saved["model"])


def test_f18_a_checkpoint_in_any_phase_of_an_exchange_of_rows_is_the_live_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved between eviction, write-back and promotion; dirty rows of the caches are in it."""
    live, other = Run("adagrad", seed=0), Run("adagrad", seed=1)
    phases: list[str] = []

    def table(run: Run, name: str) -> Tensor:
        return run.ebc.to_dense(name)

    def check(phase: str) -> None:
        root = tmp_path / str(len(phases))
        save_checkpoint(root, 1, {"model": live.ebc.state_dict()}, {})
        found = latest_checkpoint(root)
        assert found is not None
        found.load({"model": other.ebc.state_dict()})
        for name in TABLES:
            assert torch.equal(table(other, name), table(live, name)), (phase, name)
        phases.append(phase)

    def around(owner: Any, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def outer(*args: Any) -> Any:
            check(f"before {name}")
            result = inner(*args)
            check(f"after {name}")
            return result

        monkeypatch.setattr(owner, name, outer)

    around(refresh_module, "evict")
    around(refresh_module, "promote")
    around(HotRowCache, "settle")
    for _ in range(4):
        live.step()
    check("between steps")
    assert {f"{when} {name}" for when in ("before", "after") for name in ("evict", "promote")} <= set(phases)
    assert any(cache.metrics().evictions for cache in live.ebc.hot_row_caches().values())
