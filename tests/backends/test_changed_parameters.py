"""Tables whose parameters are no longer those they were built with: pruned, parametrized, replaced, tied.

What is right is what plain torch makes of the same module; a kernel that read them in its own order would
give other rows, or step beyond the end of a parameter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchrec
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.utils import parametrizations, parametrize, prune
from torchrec import KeyedJaggedTensor

from recemb import (
    ROBE,
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    HotRows,
    MixedDimension,
    QuotientRemainder,
)
from recemb.errors import ConfigError
from recemb.spec import Compression, TensorTrain
from recemb.torchrec_io import quantize_embeddings
from recemb_kernels import native

ROWS, DIM = 40, 8
PARTS: dict[str, tuple[Compression, str]] = {
    "dense": (Dense(), "weight"),
    "qr q": (QuotientRemainder(collisions=4), "q"),
    "qr r": (QuotientRemainder(collisions=4), "r"),
    "md": (MixedDimension(dim=4), "p"),
    "robe": (ROBE(compress_rate=2, block_size=4), "array"),
    "tt": (TensorTrain(rank=2), "core_1"),
}


def _collection(*compressions: Compression) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"t{k}",
                num_embeddings=ROWS,
                embedding_dim=DIM,
                feature_names=[f"f{k}"],
                compression=compression,
            )
            for k, compression in enumerate(compressions)
        ]
    )


def _batch(tables: int = 1) -> KeyedJaggedTensor:
    ids = torch.arange(0, ROWS, 3).repeat(tables)
    return KeyedJaggedTensor(
        keys=[f"f{k}" for k in range(tables)], values=ids, lengths=torch.ones(len(ids), dtype=torch.int64)
    )


def _table(made: EmbeddingBagCollection) -> Any:
    return made.embedding_bags["t0"]


def _rows(made: EmbeddingBagCollection) -> Tensor:
    """By plain torch, of what stands under the parameters' names now."""
    ids = _batch().values()
    rows: Tensor = _table(made).rows(_table(made).map_ids(ids))
    return rows


@pytest.mark.parametrize("before", [False, True], ids=["at once", "after a look-up"])
@pytest.mark.parametrize("part", PARTS)
def test_a_pruned_parameter_is_looked_up_through_its_mask(part: str, before: bool) -> None:
    compression, name = PARTS[part]
    made = _collection(compression)
    if before:
        made(_batch())
    prune.random_unstructured(_table(made), name, amount=0.5)
    expected = _rows(made)
    torch.testing.assert_close(made(_batch()).values(), expected)
    with torch.no_grad():
        torch.testing.assert_close(made(_batch()).values(), expected.detach())
    torch.testing.assert_close(_table(made).to_dense()[_batch().values()], expected.detach())


@pytest.mark.parametrize("part", PARTS)
def test_a_step_leaves_what_is_pruned_alone(part: str) -> None:
    compression, name = PARTS[part]
    made = _collection(compression)
    prune.random_unstructured(_table(made), name, amount=0.5)
    apply_optimizer_in_backward(torch.optim.SGD, made.parameters(), {"lr": 0.1})
    mask, was = getattr(_table(made), f"{name}_mask"), getattr(_table(made), f"{name}_orig").detach().clone()
    made(_batch()).values().square().sum().backward()
    moved = getattr(_table(made), f"{name}_orig").detach() != was
    assert moved.any()
    assert not moved[mask == 0].any()


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
@pytest.mark.parametrize("part", PARTS)
def test_a_table_is_not_overwritten_through_a_mask(part: str, how: str) -> None:
    compression, name = PARTS[part]
    made = _collection(compression)
    if how == "pruned":
        prune.random_unstructured(_table(made), name, 0.5)
    else:
        parametrize.register_parametrization(_table(made), name, nn.Identity())
    before = {key: value.clone() for key, value in made.state_dict().items()}
    with pytest.raises(ConfigError, match=f"table 't0': .* write to '{name}', which is pruned"):
        made.from_dense("t0", torch.randn(ROWS, DIM))
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())


def test_pruned_cached_rows_are_not_overwritten_through_a_mask() -> None:
    made = _collection(QuotientRemainder(collisions=4, cache=HotRows(rows=2)))
    prune.random_unstructured(_table(made).cache, "weight", 0.5)
    with pytest.raises(ConfigError, match=r"table 't0': .* write to 'weight'.*\['t0'\]\.cache, 'weight'"):
        made.from_dense("t0", torch.randn(ROWS, DIM))


def _changed(part: str, how: str) -> tuple[EmbeddingBagCollection, EmbeddingBagCollection]:
    """A collection with a pruned or parametrized part, and one with the parameters that this comes to.

    What the mask or the parametrization acts on is written to afterwards, as a step or a checkpoint does.
    """
    compression, name = PARTS[part]
    made, plain = _collection(compression), _collection(compression)
    if how == "pruned":
        prune.random_unstructured(_table(made), name, 0.5)
    else:
        parametrizations.weight_norm(_table(made), name)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
        for own, _ in _table(plain).layout:
            known, changed = _table(plain)._parameters[own], getattr(_table(made), own)
            if how == "pruned" and own == name:
                changed = getattr(_table(made), f"{own}_orig") * getattr(_table(made), f"{own}_mask")
            known.copy_(changed)
    return made, plain


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_looked_up_is_what_the_parameters_come_to_now(part: str, how: str) -> None:
    made, plain = _changed(part, how)
    torch.testing.assert_close(made(_batch()).values(), plain(_batch()).values())
    made, plain = _changed(part, how)
    torch.testing.assert_close(made.to_dense("t0"), plain.to_dense("t0"))


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_quantised_is_what_the_parameters_come_to_now(
    part: str, dtype: torch.dtype, how: str
) -> None:
    made, plain = _changed(part, how)
    served, expected = quantize_embeddings(made, dtype), quantize_embeddings(plain, dtype)
    assert torch.equal(served(_batch()).values(), expected(_batch()).values())


@pytest.mark.filterwarnings("ignore:.*assigned during export")
@pytest.mark.parametrize("how", ["pruned", "parametrized"])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_exported_is_what_the_parameters_come_to_now(part: str, how: str) -> None:
    made, plain = _changed(part, how)
    given = _batch().values(), _batch().lengths()
    program = torch.export.export(Served(made), given)
    torch.testing.assert_close(program.module()(*given), plain(_batch()).values())


class Served(nn.Module):
    """A collection as torch.export takes one."""

    def __init__(self, collection: EmbeddingBagCollection) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """[B, D] of one feature."""
        features = KeyedJaggedTensor(keys=["f0"], values=ids, lengths=lengths)
        values: Tensor = self.collection(features).values()
        return values


@pytest.mark.parametrize("part", PARTS)
def test_a_pruned_table_trains_step_by_step(part: str) -> None:
    compression, name = PARTS[part]
    made = _collection(compression)
    prune.random_unstructured(_table(made), name, amount=0.5)
    named = dict(_table(made).named_parameters())
    optimizer = torch.optim.SGD(named.values(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = made(_batch()).values().square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_a_parametrized_table_is_looked_up_as_torchrecs() -> None:
    made = _collection(Dense())
    stock = torchrec.EmbeddingBagCollection(
        tables=[
            torchrec.EmbeddingBagConfig(
                name="t0", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["f0"]
            )
        ]
    )
    with torch.no_grad():
        stock.embedding_bags["t0"].weight.copy_(_table(made).weight)
    for each in (made, stock):
        parametrizations.weight_norm(each.embedding_bags["t0"], "weight")
    torch.testing.assert_close(made(_batch()).values(), stock(_batch()).values())
    torch.testing.assert_close(_table(made).to_dense(), stock.embedding_bags["t0"].weight.detach())


def test_a_parameter_with_too_few_rows_is_not_read_beyond_its_end() -> None:
    made = _collection(Dense())
    _table(made).weight = nn.Parameter(torch.randn(10, DIM))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"index_size|valid range"):
        made(_batch())


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, torch.optim.Adam])
def test_a_parameter_of_two_tables_takes_one_step(
    optimizer: type[torch.optim.Optimizer], compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch adds up its two gradients."""
    if not compiler:
        monkeypatch.setattr(native, "_unavailable", dict.fromkeys(native.OPS, "for a test"))
    made = _collection(Dense(), Dense())
    made.embedding_bags["t1"].weight = _table(made).weight
    stock = nn.Parameter(_table(made).weight.detach().clone())
    apply_optimizer_in_backward(optimizer, made.parameters(), {"lr": 0.1, "eps": 1e-3})
    apply_optimizer_in_backward(optimizer, [stock], {"lr": 0.1, "eps": 1e-3})
    ids = _batch().values()
    for _ in range(2):
        made(_batch(2)).values().square().sum().backward()
        (2 * stock[ids].square().sum()).backward()
    torch.testing.assert_close(_table(made).weight[ids], stock[ids])
