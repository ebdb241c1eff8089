"""Ids and parameters that 32 bits cannot count."""

from __future__ import annotations

import copy

import pytest
import torch
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
from tests.gpu.device import needs_gpu
from tests.gpu.test_collection import loss_of

pytestmark = pytest.mark.gpu

MANY = 2**33 + 5
NEAR = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1, 2**33, MANY - 1]
METHODS = {
    "tt": TensorTrain(rank=16),
    "qr": QuotientRemainder(collisions=2**15),
    "robe": ROBE(compress_rate=2**17, block_size=8),
}


def test_ids_beyond_32_bits() -> None:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            num_embeddings=MANY,
            embedding_dim=16,
            feature_names=[name],
            compression=compression,
            weight_init_min=-1.0,
            weight_init_max=1.0,
        )
        for name, compression in METHODS.items()
    ]
    cpu = EmbeddingBagCollection(tables=tables)
    gpu = copy.deepcopy(cpu).to("cuda")
    for module in (cpu, gpu):
        apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.5})
    ids = torch.tensor(NEAR * len(METHODS))
    kjt = KeyedJaggedTensor(keys=list(METHODS), values=ids, lengths=torch.ones_like(ids))
    before = [p.detach().clone() for p in cpu.parameters()]
    for _ in range(2):
        ours, theirs = gpu(kjt.to("cuda")).values(), cpu(kjt).values()
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-6)
        for pooled in (ours, theirs):
            (100 * loss_of(pooled)).backward()
    for mine, other, old in zip(gpu.parameters(), cpu.parameters(), before, strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-4, atol=1e-6)
        assert float((other.detach() - old).abs().max()) > 1e-3


@needs_gpu
def test_parameters_beyond_2_31_elements() -> None:
    """Parameters of 9 GB, looked up and stepped, against torch's own indexing and its dense gradients."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * 2**33:
        pytest.skip(f"needs 48 GiB of free memory of the GPU, and there are {free / 2**30:.0f}")
    cases: list[tuple[Compression, int, int]] = [
        (Dense(), 35_000_000, 64),
        (MixedDimension(dim=64), 35_000_000, 128),
        (ROBE(compress_rate=1, block_size=16), 140_000_000, 16),
    ]
    for compression, rows, dim in cases:
        furthest = steps_apart(compression, rows, dim)
        torch.cuda.empty_cache()
        assert furthest < 1e-5, compression


def steps_apart(compression: Compression, rows: int, dim: int) -> float:
    """How far a step of SGD moves any weight from where torch's own would have it."""
    config = EmbeddingBagConfig(
        name="t", num_embeddings=rows, embedding_dim=dim, feature_names=["f"], compression=compression
    )
    torch.manual_seed(0)
    gpu = EmbeddingBagCollection(tables=[config], device="cuda")
    table = gpu.embedding_bags["t"]
    ids = torch.cat([torch.tensor([0, 1, rows - 2, rows - 1]), torch.randint(2, rows - 2, (500,))]).to("cuda")
    expected = table.rows(table.map_ids(ids)).float()
    expected.square().sum().backward()
    longest = max(gpu.parameters(), key=torch.Tensor.numel)
    assert longest.numel() > 2**31
    assert longest.grad is not None
    moved = longest.detach() - longest.grad
    for parameter in gpu.parameters():
        parameter.grad = None
    apply_optimizer_in_backward(torch.optim.SGD, gpu.parameters(), {"lr": 1.0})
    kjt = KeyedJaggedTensor(keys=["f"], values=ids, lengths=torch.ones_like(ids))
    found = gpu(kjt).values()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    return float(moved.sub_(longest.detach()).abs_().max())
