"""Cached tables through the kernels for GPU: split in place, without the host learning any length."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends import build
from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.cache import hot_rows
from recemb.cache.refresh import cache_of
from recemb.engine import Engine
from recemb.spec import Dense, HotRows, MixedDimension, TableSpec, TensorTrain
from tests.kernels.triton.harness import by_triton
from tests.kernels.triton.no_host_sync import NoHostSync

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="of tensors on the CPU; tests/gpu has the GPU's own"
)


def make(policy: str, **more: int) -> tuple[Engine, dict[str, Backend]]:
    torch.manual_seed(0)
    hot = HotRows(rows=12, policy=policy, refresh_every=2, warmup=1, **more)  # type: ignore[arg-type]
    methods = {"tt": TensorTrain(rank=4, cache=hot), "plain": Dense(), "md": MixedDimension(dim=2, cache=hot)}
    specs = [
        TableSpec(
            name=name,
            num_embeddings=200,
            embedding_dim=8,
            feature_names=("a", "b") if name == "tt" else (name,),
            pooling="mean" if name == "md" else "sum",
            compression=compression,
            init_std=0.5,
        )
        for name, compression in methods.items()
    ]
    tables = build(specs, torch.device("cpu"))
    for table in tables.values():
        table.reset_parameters()
        apply_optimizer_in_backward(torch.optim.Adagrad, table.parameters(), {"lr": 0.1})
    return Engine(specs), tables


def train(policy: str, weighted: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    engine, tables = make(policy)
    generator, outputs = torch.Generator().manual_seed(2), []
    for _ in range(7):
        lengths = torch.randint(0, 4, (4 * 6,), generator=generator)
        ids = (torch.rand(int(lengths.sum()), generator=generator) ** 3 * 200).long()
        weights = torch.rand(ids.numel(), generator=generator) if weighted else None
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        out = engine(tables, Bags(ids, offsets, 4, weights))
        out.square().mean().backward()
        outputs.append(out.detach())
    state = {
        f"{name}.{key}": value for name, table in tables.items() for key, value in table.state_dict().items()
    }
    assert bool((cache_of(tables["tt"]).ids >= 0).any()), "no row was ever cached"
    return outputs, state


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("policy", ["lfu", "lru", "importance"])
def test_the_same_as_compacted_streams(policy: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, state = train(policy, weighted)
    monkeypatch.setattr(Engine, "_choose", staticmethod(lambda both, tables, bags: both[1]))
    with by_triton():
        outputs, reached = train(policy, weighted)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert state.keys() == reached.keys()
    for key, value in state.items():
        torch.testing.assert_close(reached[key], value, rtol=1e-3, atol=1e-4, msg=key)


def numbers_of_steps(tables: dict[str, Backend]) -> list[Tensor]:
    """Which optimizers keep on the host, on a GPU too."""
    optimizers = [(p, p._in_backward_optimizers[0]) for table in tables.values() for p in table.parameters()]
    return [optimizer.state[p]["step"] for p, optimizer in optimizers if "step" in optimizer.state[p]]


@pytest.mark.parametrize("policy", ["lfu", "lru", "importance"])
def test_a_step_between_exchanges_never_waits_for_the_device(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "_choose", staticmethod(lambda both, tables, bags: both[1]))
    monkeypatch.setattr(hot_rows, "count", lambda *_: False)  # the CPU's own kernel
    engine, tables = make(policy, track_every=1)
    offsets = torch.arange(0, 2 * 4 * 6 + 1, 2)
    target = torch.ones(6, 32)
    batches = [Bags(torch.arange(48) ** 2 % (40 + step), offsets, 4) for step in range(7)]
    with by_triton():
        for bags in batches[:6]:
            engine(tables, bags).backward(target)
        # Rows are exchanged before an odd step. The verdict on a gradient is what the CPU reads at once.
        with patch("recemb_kernels.triton_frame.group.note"), NoHostSync(numbers_of_steps(tables)):
            engine(tables, batches[6]).backward(target)
    assert bool(torch.isin(batches[6].ids[:24], cache_of(tables["tt"]).ids).any()), "nothing was cached"
