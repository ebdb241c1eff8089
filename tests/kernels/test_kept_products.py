"""Products of a train in slices: kept for the backward, or computed again in it."""

from __future__ import annotations

import torch

from recemb.backends import build
from recemb.backends.native import pooled_native
from recemb.bags import Bags
from recemb.spec import TableSpec, TensorTrain
from tests.kernels.cases import group_of


def test_products_of_slices_are_kept_where_all_tables_have_few() -> None:
    """A train alone keeps them, one of four computes them again: with the same bits, in no more memory."""
    train = TensorTrain(rank=32, row_shape=(100, 100, 10), dim_shape=(1, 1, 16))
    torch.manual_seed(0)
    ids, grad = torch.randint(10**5, (20_000,)), torch.randn(20_000, 16)
    products = 32 * 4 * ids.div(10, rounding_mode="floor").unique().numel()
    held, outcomes = [], []
    for count, changed in ((1, False), (4, False), (1, True), (4, True)):
        specs = [
            TableSpec(
                name=f"t{k}",
                num_embeddings=10**5,
                embedding_dim=16,
                feature_names=(f"t{k}",),
                compression=train,
            )
            for k in range(count)
        ]
        torch.manual_seed(0)
        tables = build(specs, torch.device("cpu"))
        for table in tables.values():
            table.reset_parameters()
        bags = Bags(ids.repeat(count), torch.arange(20_000 * count + 1), count)
        pooled = pooled_native(list(tables.values()), bags, 2**13)
        assert pooled is not None
        first, *_, last = tables["t0"].parameters()
        if changed:
            first.data.mul_(2)  # unseen by autograd: what is computed again is twice as large
        outcomes.append(torch.autograd.grad(pooled[:, :16], last, grad)[0])
        held.append(group_of(tables).workspace_bytes)
    alone, among, kept, again = outcomes
    assert torch.equal(alone, among)
    assert torch.equal(alone, kept)
    assert torch.equal(2 * alone, again)
    assert held[1] < held[0] + products, (held, products)
