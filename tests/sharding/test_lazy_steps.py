"""Which replicated parameters take Adam's step lazily: those whose rows a kernel would step one by one."""

from __future__ import annotations

import pytest
import torch

from recemb import ROBE, Compression, MixedDimension, QuotientRemainder, TensorTrain
from recemb.backends import build, native
from recemb.spec import DTypeName, TableSpec
from recemb.torchrec_io.sharding.kernel import _stepped_lazily
from recemb.torchrec_io.sharding.replicas import Replicas

METHODS: dict[str, Compression] = {
    "tt": TensorTrain(rank=2),
    "qr": QuotientRemainder(collisions=5),
    "robe": ROBE(compress_rate=5, block_size=8),
    "md": MixedDimension(dim=2),
}


def lazy(device: str = "cpu", dtype: DTypeName = "float32") -> set[str]:
    specs = [
        TableSpec(name=name, num_embeddings=100, embedding_dim=8, compression=compression, dtype=dtype)
        for name, compression in METHODS.items()
    ]
    backends = build(specs, torch.device(device))
    keys = [f"{name}.{param}" for name, own in backends.items() for param in own.own_parameters()]
    found = {id(parameter) for parameter in _stepped_lazily(backends, Replicas(backends, keys, None, 1))}
    return {
        f"{name}.{param}"
        for name, own in backends.items()
        for param, parameter in own.own_parameters().items()
        if id(parameter) in found
    }


def test_all_but_a_projection_which_every_batch_moves() -> None:
    assert lazy() == {"tt.core_0", "tt.core_1", "tt.core_2", "qr.q", "qr.r", "robe.array", "md.e"}


def test_none_where_no_kernel_reads_the_tables() -> None:
    assert lazy(dtype="bfloat16") == set()
    assert lazy("meta") == set()


def test_none_where_no_kernel_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda shapes, device: [False] * len(shapes))
    assert lazy() == set()
