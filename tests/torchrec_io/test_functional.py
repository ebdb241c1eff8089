"""Weights that are lent for one look-up, and transforms of torch.func's, which are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torchrec import KeyedJaggedTensor

from recemb import (
    ROBE,
    Compression,
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    HotRows,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)
from recemb.errors import ConfigError

METHODS: dict[str, Compression] = {
    "dense": Dense(),
    "tt": TensorTrain(rank=4),
    "qr": QuotientRemainder(collisions=4),
    "robe": ROBE(compress_rate=2, block_size=4),
    "md": MixedDimension(dim=4),
}
BATCH = KeyedJaggedTensor(keys=["f"], values=torch.arange(12), lengths=torch.full((6,), 2))
BATCH.offsets()  # which it keeps: not those of a transform, where that is the first to ask
by_method = pytest.mark.parametrize("method", METHODS)


def made(compression: Compression, seed: int = 0) -> EmbeddingBagCollection:
    torch.manual_seed(seed)
    config = EmbeddingBagConfig(
        name="t", num_embeddings=24, embedding_dim=8, feature_names=["f"], compression=compression
    )
    return EmbeddingBagCollection(tables=[config])


def loss(module: EmbeddingBagCollection, lent: dict[str, Tensor]) -> Tensor:
    return torch.sin(functional_call(module, lent, (BATCH,)).values()).sum()


@pytest.mark.parametrize("fused", [False, True])
@by_method
def test_lent_weights_are_looked_up_and_take_the_gradient(method: str, fused: bool) -> None:
    own, other = made(METHODS[method]), made(METHODS[method], seed=1)
    expected = torch.sin(other(BATCH).values()).sum()
    grads = torch.autograd.grad(expected, list(other.parameters()))
    if fused:
        apply_optimizer_in_backward(torch.optim.SGD, own.parameters(), {"lr": 0.1})
    before = [parameter.detach().clone() for parameter in own.parameters()]
    lent = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    for _ in range(2):
        found = loss(own, lent)
        torch.testing.assert_close(found, expected)
        for mine, theirs in zip(torch.autograd.grad(found, list(lent.values())), grads, strict=True):
            torch.testing.assert_close(mine, theirs)
        assert all(map(torch.equal, own.parameters(), before))
        own(BATCH)


TRANSFORMS: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "grad": lambda f, p: grad(f)(p),
    "vjp": lambda f, p: vjp(f, p),
    "jvp": lambda f, p: jvp(f, (p,), (p,)),
    "jacrev": lambda f, p: jacrev(f)(p),
    "hessian": lambda f, p: hessian(f)(p),
    "vmap": lambda f, p: vmap(f)({name: torch.stack([value, value]) for name, value in p.items()}),
    "vmap of grad": lambda f, p: vmap(grad(f))({n: torch.stack([value, value]) for n, value in p.items()}),
    "grad of another": lambda f, p: grad(lambda x: x * f({}))(torch.ones(())),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", TRANSFORMS)
@by_method
def test_transforms_are_refused(method: str, transform: str, dtype: torch.dtype) -> None:
    """In float64 too, which no kernel reads."""
    own = made(METHODS[method]).to(dtype)
    lent = {name: parameter.detach() for name, parameter in own.named_parameters()}
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"cannot be transformed by torch\.func"):
            TRANSFORMS[transform](lambda p: loss(own, p), lent)
        # The next time a look-up like the last one's is one call.
        loss(own, {}).backward()
    with torch.autograd.forward_ad.dual_level():
        dual = {n: torch.autograd.forward_ad.make_dual(value, value) for n, value in lent.items()}
        with pytest.raises(NotImplementedError):
            loss(own, dual)


@pytest.mark.parametrize("write_back", [False, True])
def test_no_rows_are_exchanged_while_weights_are_lent(write_back: bool) -> None:
    hot = HotRows(rows=4, refresh_every=1, warmup=1, track_every=1, write_back=write_back)
    own = made(QuotientRemainder(collisions=4, cache=hot))
    own(BATCH).values().sum().backward()
    own.zero_grad()
    cache, before = own.hot_row_caches()["t"], own.to_dense("t")
    assert cache.due
    lent = {name: (3 * p.detach()).requires_grad_() for name, p in own.named_parameters()}
    kept = {name: value.detach().clone() for name, value in lent.items()}
    loss(own, lent).backward()
    assert all(torch.equal(value, kept[name]) for name, value in lent.items())
    assert torch.equal(own.to_dense("t"), before)
    assert not cache.metrics().promotions
    own(BATCH)
    assert cache.metrics().promotions
    torch.testing.assert_close(own.to_dense("t"), before)
