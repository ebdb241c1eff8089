"""Training that is saved, built anew and loaded equals training that was not interrupted, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchrec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor

from recemb import (
    ROBE,
    Compression,
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)
from recemb.optim import FusedUpdate
from recemb_kernels import native

ROWS, BATCH = {"a": 500, "b": 60}, 20
FUSED: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05, "lr_decay": 0.1}),
    "rowwise_adagrad": (torchrec.optim.RowWiseAdagrad, {"lr": 0.05}),
    "adam": (torch.optim.Adam, {"lr": 0.02}),
}
# No kernel fuses these: torch's own hook steps, and makes their state on the first step.
HOOKED: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.02, "amsgrad": True}),
}
COMPRESSIONS: dict[str, Compression] = {
    "tt": TensorTrain(rank=8),
    "qr": QuotientRemainder(collisions=10),
    "robe": ROBE(compress_rate=10, block_size=8),
    "md": MixedDimension(dim=3),
    "dense": Dense(),
}
by_method = pytest.mark.parametrize("method", COMPRESSIONS)


def _build(method: str, optimizer: str, seed: int) -> EmbeddingBagCollection:
    torch.manual_seed(seed)
    ebc = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=rows,
                embedding_dim=16,
                feature_names=[name] if name == "a" else ["b", "c"],
                compression=COMPRESSIONS[method],
            )
            for name, rows in ROWS.items()
        ]
    )
    kind, options = (FUSED | HOOKED)[optimizer]
    apply_optimizer_in_backward(kind, ebc.parameters(), dict(options))
    return ebc


def _step(ebc: EmbeddingBagCollection, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (3 * BATCH,), generator=generator)
    parts = [
        torch.randint(0, rows // 3, (int(part.sum()),), generator=generator)
        for rows, part in zip((ROWS["a"], ROWS["b"], ROWS["b"]), lengths.split(BATCH), strict=True)
    ]
    batch = KeyedJaggedTensor(keys=["a", "b", "c"], values=torch.cat(parts), lengths=lengths)
    values = ebc(batch).values()
    (values - torch.linspace(-1, 1, values.shape[1])).square().mean().backward()


def _saved(ebc: EmbeddingBagCollection) -> dict[str, Any]:
    return copy.deepcopy({"model": ebc.state_dict(), "optimizer": ebc.fused_optimizer.state_dict()})


def _resume_equals_straight(method: str, optimizer: str, before: int, after: int) -> None:
    straight = _build(method, optimizer, seed=0)
    for step in range(before):
        _step(straight, step)
    saved = _saved(straight)
    resumed = _build(method, optimizer, seed=1)
    resumed.load_state_dict(saved["model"])
    resumed.fused_optimizer.load_state_dict(saved["optimizer"])
    for step in range(before, before + after):
        _step(straight, step)
        _step(resumed, step)
    torch.testing.assert_close(_saved(resumed), _saved(straight), rtol=0, atol=0)
    assert all(parameter.isfinite().all() for parameter in straight.parameters())


@by_method
@pytest.mark.parametrize("optimizer", FUSED)
def test_fused(optimizer: str, method: str) -> None:
    _resume_equals_straight(method, optimizer, before=3, after=3)


@settings(max_examples=12)
@given(
    method=st.sampled_from(sorted(COMPRESSIONS)),
    optimizer=st.sampled_from(sorted(FUSED)),
    before=st.integers(0, 4),
    after=st.integers(1, 3),
)
def test_fused_at_any_step(method: str, optimizer: str, before: int, after: int) -> None:
    _resume_equals_straight(method, optimizer, before, after)


@pytest.mark.parametrize("method", ["tt", "dense"])
@pytest.mark.parametrize("optimizer", HOOKED)
def test_stepped_by_torchs_hook(optimizer: str, method: str) -> None:
    assert FusedUpdate().of(list(_build(method, optimizer, 0).parameters())) is None
    _resume_equals_straight(method, optimizer, before=3, after=3)


@by_method
def test_without_a_compiler(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_unavailable", dict.fromkeys(native.OPS, "no compiler in this test"))
    _resume_equals_straight(method, "adam", before=2, after=2)


@by_method
def test_the_optimizers_state_matters(method: str) -> None:
    straight = _build(method, "adagrad", seed=0)
    for step in range(3):
        _step(straight, step)
    forgetful = _build(method, "adagrad", seed=1)
    forgetful.load_state_dict(straight.state_dict())
    _step(straight, 3)
    _step(forgetful, 3)
    pairs = zip(forgetful.parameters(), straight.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)
