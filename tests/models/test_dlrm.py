"""``recemb.models.dlrm`` against torchrec's own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchrec
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import recemb
from recemb.errors import ConfigError
from recemb.models import dlrm

FEATURES = ("cat_0", "cat_1", "cat_2")
SIZES: dict[str, Any] = {"dense_arch_layer_sizes": [6, 4], "over_arch_layer_sizes": [5, 1]}


def torchrec_tables(rows: int = 11, dim: int = 4) -> torchrec.EmbeddingBagCollection:
    return torchrec.EmbeddingBagCollection(
        tables=[
            torchrec.EmbeddingBagConfig(
                name=f"t_{name}", num_embeddings=rows, embedding_dim=dim, feature_names=[name]
            )
            for name in FEATURES
        ]
    )


def recemb_tables(dim: int = 4) -> recemb.EmbeddingBagCollection:
    compressions = (
        recemb.TensorTrain(rank=2),
        recemb.QuotientRemainder(collisions=3),
        recemb.MixedDimension(dim=2),
    )
    return recemb.EmbeddingBagCollection(
        tables=[
            recemb.EmbeddingBagConfig(
                name=f"t_{name}",
                num_embeddings=11,
                embedding_dim=dim,
                feature_names=[name],
                compression=compression,
            )
            for name, compression in zip(FEATURES, compressions, strict=True)
        ]
    )


def inputs(batch_size: int = 64) -> tuple[torch.Tensor, KeyedJaggedTensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(batch_size, 5, generator=generator)
    ids = torch.randint(0, 11, (len(FEATURES) * batch_size,), generator=generator)
    return dense, KeyedJaggedTensor(
        keys=list(FEATURES), values=ids, lengths=torch.ones(ids.numel(), dtype=torch.int64)
    )


@pytest.mark.parametrize("interaction", ["original", "dcn"])
def test_equals_torchrecs_class(interaction: str) -> None:
    reference = (
        DLRM(torchrec_tables(), 5, [6, 4], [5, 1])
        if interaction == "original"
        else DLRM_DCN(torchrec_tables(), 5, [6, 4], [5, 1], dcn_num_layers=2, dcn_low_rank_dim=3)
    )
    model = dlrm(
        torchrec_tables(), 5, interaction_type=interaction, dcn_num_layers=2, dcn_low_rank_dim=3, **SIZES
    )
    assert type(model) is type(reference)
    model.load_state_dict(reference.state_dict())
    dense, sparse = inputs()
    assert torch.equal(model(dense, sparse), reference(dense, sparse))


def test_parameter_count() -> None:
    tables = 3 * 11 * 4
    bottom = (5 * 6 + 6) + (6 * 4 + 4)
    # 3 features and the dense output: 4 + (4 choose 2) interactions.
    top = ((4 + 6) * 5 + 5) + (5 + 1)
    model = dlrm(torchrec_tables(), 5, **SIZES)
    assert sum(p.numel() for p in model.parameters()) == tables + bottom + top

    cross = 2 * (16 * 3 + 3 * 16 + 16)
    top = (16 * 5 + 5) + (5 + 1)
    model = dlrm(torchrec_tables(), 5, interaction_type="dcn", dcn_num_layers=2, dcn_low_rank_dim=3, **SIZES)
    assert sum(p.numel() for p in model.parameters()) == tables + bottom + cross + top


@pytest.mark.parametrize("interaction", ["original", "dcn"])
@pytest.mark.parametrize("tables", [torchrec_tables, recemb_tables])
def test_gradients_reach_every_parameter(tables: Any, interaction: str) -> None:
    torch.manual_seed(0)
    sizes = {"dense_arch_layer_sizes": [32, 4], "over_arch_layer_sizes": [32, 1]}
    model = dlrm(tables(), 5, interaction_type=interaction, dcn_num_layers=2, dcn_low_rank_dim=3, **sizes)
    dense, sparse = inputs()
    model(dense, sparse).square().sum().backward()
    dead = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    ]
    assert dead == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense_arch_layer_sizes": [6, 5]}, r"must end with the tables' embedding_dim, 4"),
        ({"dense_arch_layer_sizes": []}, r"dense_arch_layer_sizes=\[\]"),
        ({"over_arch_layer_sizes": [5, 2]}, r"over_arch_layer_sizes=\[5, 2\]"),
        ({"over_arch_layer_sizes": [1]}, r"two sizes or more"),
        ({"interaction_type": "projection"}, r"'projection' must be 'original' or 'dcn'"),
        ({"interaction_type": "dcn", "dcn_low_rank_dim": 0}, r"dcn_low_rank_dim=0"),
        ({"dense_in_features": 0}, r"dense_in_features=0"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    arguments = {"dense_in_features": 5, **SIZES, **change}
    with pytest.raises(ConfigError, match=message):
        dlrm(torchrec_tables(), **arguments)


def test_tables_of_different_dimensions() -> None:
    tables = [
        torchrec.EmbeddingBagConfig(
            name=f"t{dim}", num_embeddings=3, embedding_dim=dim, feature_names=[f"f{dim}"]
        )
        for dim in (4, 8)
    ]
    with pytest.raises(ConfigError, match=r"'t8' has embedding_dim=8 but 't4' has 4"):
        dlrm(torchrec.EmbeddingBagCollection(tables=tables), 5, **SIZES)
