"""Which replicated parameters take Adam's step lazily: those whose rows a kernel would step one by one."""

from __future__ import annotations

import torch.distributed as dist
from torch import device

from recemb import ROBE, Compression, MixedDimension, QuotientRemainder, TensorTrain
from recemb.backends import build
from recemb.spec import TableSpec
from recemb.torchrec_io.sharding.kernel import stepped_lazily
from recemb.torchrec_io.sharding.replicas import Replicas

METHODS: dict[str, Compression] = {
    "tt": TensorTrain(rank=2),
    "qr": QuotientRemainder(collisions=5),
    "robe": ROBE(compress_rate=5, block_size=8),
    "md": MixedDimension(dim=2),
}


def test_all_but_a_projection_which_every_batch_moves() -> None:
    specs = [
        TableSpec(name=name, num_embeddings=100, embedding_dim=8, compression=compression)
        for name, compression in METHODS.items()
    ]
    backends = build(specs, device("cpu"))
    named = {
        f"{name}.{param}": p for name, own in backends.items() for param, p in own.own_parameters().items()
    }
    replicas = Replicas(backends, list(named), dist.GroupMember.NON_GROUP_MEMBER, 1)
    found = {id(parameter) for parameter in stepped_lazily(backends, replicas)}
    assert {key for key, parameter in named.items() if id(parameter) in found} == set(named) - {"md.p"}
