"""Collections of half types against float32's of the same numbers: in the interpreter, and on a GPU."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor

from recemb import EmbeddingBagCollection, EmbeddingBagConfig
from recemb.spec import ROBE, Compression, Dense, MixedDimension, QuotientRemainder, TensorTrain

DTYPES = (torch.bfloat16, torch.float16)
METHODS: dict[str, Compression] = {
    "tt": TensorTrain(rank=16),
    "wide": TensorTrain(rank=8, num_cores=2),
    "qr": QuotientRemainder(collisions=7),
    "robe": ROBE(compress_rate=10, block_size=8),
    "md": MixedDimension(dim=4),
    "dense": Dense(),
}
# Large steps: small ones are rounded away.
_ROWS, _DIM, _BATCH, _LEARNING_RATE = 500, 32, 16, 1e3
# Of the largest number: products of cores and gradients are rounded to the type, and the interpreter cuts
# bfloat16 off where a GPU rounds.
_UNITS = 4


def _features(seed: int) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (len(METHODS) * _BATCH,), generator=generator)
    values = (torch.rand(int(lengths.sum()), generator=generator) ** 2 * _ROWS).long()
    return KeyedJaggedTensor(keys=list(METHODS), values=values, lengths=lengths)


def _loss(pooled: Tensor) -> Tensor:
    return (pooled * torch.sin(torch.arange(pooled.shape[1], device=pooled.device))).square().mean()


def _assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    off = (found.cpu().float() - exact).abs().max()
    assert off <= _UNITS * torch.finfo(dtype).eps * exact.abs().max()


def assert_half_types_are_right(dtype: torch.dtype, device: str, fused: bool) -> None:
    """Outputs, and gradients or parameters after a step of SGD's."""
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            num_embeddings=_ROWS,
            embedding_dim=_DIM,
            feature_names=[name],
            compression=compression,
        )
        for name, compression in METHODS.items()
    ]
    half = EmbeddingBagCollection(tables=tables).to(dtype)
    exact = copy.deepcopy(half).float()
    half = half.to(device)
    before = [parameter.detach().clone() for parameter in half.parameters()]
    if fused:
        for module in (half, exact):
            apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": _LEARNING_RATE})
    batch = _features(1)
    ours, theirs = half(batch.to(torch.device(device))).values(), exact(batch).values()
    assert ours.dtype is torch.float32
    _assert_near(ours.detach(), theirs.detach(), dtype)
    _loss(ours).backward()
    _loss(theirs).backward()
    for old, mine, other in zip(before, half.parameters(), exact.parameters(), strict=True):
        assert mine.dtype is dtype
        if fused:
            assert not torch.equal(mine, old)
            _assert_near(mine.detach(), other.detach(), dtype)
        else:
            assert mine.grad is not None
            assert other.grad is not None
            assert mine.grad.dtype is dtype
            _assert_near(mine.grad, other.grad, dtype)
