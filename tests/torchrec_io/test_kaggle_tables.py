"""Criteo Kaggle's 26 tables at full size on the meta device: TT-Rec's published figures."""

from __future__ import annotations

import math

import pytest

import recemb

CARDINALITIES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
# TT-Rec (Yin et al., 2021): row shapes of the seven largest tables at dim 16 = 2 x 2 x 4.
ROW_SHAPES = {
    10131227: (200, 220, 250),
    8351593: (200, 200, 209),
    7046547: (200, 200, 200),
    5461306: (166, 175, 188),
    2202608: (125, 130, 136),
    286181: (53, 72, 75),
    142572: (50, 52, 55),
}


def kaggle(rank: int, *, published: bool) -> recemb.EmbeddingBagCollection:
    configs = []
    for k, rows in enumerate(CARDINALITIES):
        compression: recemb.Compression = recemb.Dense()
        if rows in ROW_SHAPES and published:
            compression = recemb.TensorTrain(rank=rank, row_shape=ROW_SHAPES[rows], dim_shape=(2, 2, 4))
        elif rows in ROW_SHAPES:
            compression = recemb.TensorTrain(rank=rank)
        configs.append(
            recemb.EmbeddingBagConfig(
                name=f"t_cat_{k}",
                num_embeddings=rows,
                embedding_dim=16,
                feature_names=[f"cat_{k}"],
                compression=compression,
            )
        )
    return recemb.EmbeddingBagCollection(tables=configs, device="meta")


@pytest.mark.parametrize(("rank", "ratio"), [(8, 221.9), (16, 187.0), (32, 117.4), (64, 48.0)])
def test_published_model_sizes_are_reproduced(rank: int, ratio: float) -> None:
    total = kaggle(rank, published=True).memory().total
    assert total.num_embeddings == 33_762_577
    assert round(total.dense_bytes / 1e6, 1) == 2160.8
    assert round(total.ratio, 1) == ratio
    # The same count by hand: sum_k p_k * R_{k-1} * q_k * R_k per compressed table.
    parameters = sum(
        p[0] * 2 * rank + p[1] * rank * 2 * rank + p[2] * rank * 4 for p in ROW_SHAPES.values()
    ) + sum(16 * rows for rows in CARDINALITIES if rows not in ROW_SHAPES)
    assert total.num_bytes == 4 * parameters


@pytest.mark.parametrize("rank", [4, 8, 16, 32, 64])
def test_automatic_shapes_are_never_larger_than_the_published_ones(rank: int) -> None:
    ours, theirs = kaggle(rank, published=False), kaggle(rank, published=True)
    for automatic, published in zip(ours.memory(), theirs.memory(), strict=True):
        assert automatic.num_bytes <= published.num_bytes
    for config in ours.embedding_bag_configs():
        if config.num_embeddings in ROW_SHAPES:
            heights = [parameter.shape[0] for parameter in ours.embedding_bags[config.name].parameters()]
            assert math.prod(heights) >= config.num_embeddings


def test_memory_equals_the_parameters_on_meta() -> None:
    ebc = kaggle(16, published=False)
    assert all(parameter.is_meta for parameter in ebc.parameters())
    assert ebc.memory().total.num_bytes == sum(4 * p.numel() for p in ebc.parameters())
