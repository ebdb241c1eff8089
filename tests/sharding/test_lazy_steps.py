"""Which replicated parameters take Adam's step lazily: those whose rows a kernel would step one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import pytest
import torch
import torch.distributed as dist

from recemb import ROBE, Compression, MixedDimension, QuotientRemainder, TensorTrain
from recemb.backends import build, native
from recemb.spec import DTypeName, TableSpec
from recemb.torchrec_io.sharding.kernel import _stepped_lazily
from recemb.torchrec_io.sharding.replicas import Replicas
from recemb.torchrec_io.sharding.tables import Attachment, CompressedTables

METHODS: dict[str, Compression] = {
    "tt": TensorTrain(rank=2),
    "qr": QuotientRemainder(collisions=5),
    "robe": ROBE(compress_rate=5, block_size=8),
    "md": MixedDimension(dim=2),
}


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def lazy(
    device: str = "cpu",
    dtype: DTypeName = "float32",
    rates: Mapping[str, float] | None = None,
    frozen: Collection[str] = (),
) -> set[str]:
    """The parameters that are, as ``<table>.<param>``; ``rates`` of Adam are those that are not 0.1."""
    specs = [
        TableSpec(name=name, num_embeddings=100, embedding_dim=8, compression=compression, dtype=dtype)
        for name, compression in METHODS.items()
    ]
    backends = build(specs, torch.device(device))
    keys = [f"{name}.{param}" for name, own in backends.items() for param in own.own_parameters()]
    attached = {key: Attachment(torch.optim.Adam, {}, {"lr": (rates or {}).get(key, 0.1)}) for key in keys}
    tables = CompressedTables({spec.name: spec for spec in specs}, attached, frozenset(frozen), None)
    replicas = Replicas(backends, keys, dist.group.WORLD, 1)
    found = {id(parameter) for parameter in _stepped_lazily(backends, replicas, tables)}
    return {
        f"{name}.{param}"
        for name, own in backends.items()
        for param, parameter in own.own_parameters().items()
        if id(parameter) in found
    }


def test_all_but_a_projection_which_every_batch_moves() -> None:
    assert lazy() == {"tt.core_0", "tt.core_1", "tt.core_2", "qr.q", "qr.r", "robe.array", "md.e"}


def test_none_of_a_table_whose_parameters_no_kernel_steps_together() -> None:
    every = lazy()
    trains = {key for key in every if key.startswith("tt.")}
    assert lazy(rates={"tt.core_1": 0.2}) == lazy(frozen=["tt.core_0"]) == every - trains
    # Another table's rate is its own matter.
    assert lazy(rates=dict.fromkeys(trains, 0.2)) == every


def test_none_where_no_kernel_reads_the_tables() -> None:
    assert lazy(dtype="bfloat16") == set()
    assert lazy("meta") == set()


def test_none_where_no_kernel_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda shapes, device: [False] * len(shapes))
    assert lazy() == set()
