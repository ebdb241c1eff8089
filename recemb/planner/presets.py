"""Models that ``recemb plan --preset`` knows by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from recemb.data.synthetic import KAGGLE_CARDINALITIES
from recemb.spec import TableSpec


@dataclass(frozen=True)
class Preset:
    """A model's tables and how they are looked up.

    Attributes:
        tables: uncompressed.
        pooling_factors: mean ids a sample, of each table.
        global_batch_size: samples of a step over all ranks.
    """

    tables: tuple[TableSpec, ...]
    pooling_factors: tuple[float, ...]
    global_batch_size: int


def _tables(rows: list[int] | tuple[int, ...], dims: list[int]) -> tuple[TableSpec, ...]:
    # Named as dlrm_main and recemb train name Criteo's: table t_cat_<k> of feature cat_<k>.
    return tuple(
        TableSpec(name=f"t_cat_{k}", num_embeddings=n, embedding_dim=dim, feature_names=(f"cat_{k}",))
        for k, (n, dim) in enumerate(zip(rows, dims, strict=True))
    )


def criteo_kaggle() -> Preset:
    """Criteo Kaggle, 26 tables of 33.8 M rows, dimension 16: 2.2 GB."""
    count = len(KAGGLE_CARDINALITIES)
    return Preset(_tables(tuple(KAGGLE_CARDINALITIES), [16] * count), (1.0,) * count, 16_384)


# MLCommons training reference recommendation_v2/torchrec_dlrm: num_embeddings_per_feature, multi_hot_sizes.
_MLPERF_ROWS = (
    *(40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10),
    *(2209, 11938, 155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36),
)
_MLPERF_HOTS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)


def mlperf_dlrm_dcnv2() -> Preset:
    """MLPerf's DLRM-DCNv2 on Criteo 1TB multi-hot: 26 tables of 204 M rows, dimension 128: 105 GB."""
    return Preset(_tables(_MLPERF_ROWS, [128] * 26), tuple(map(float, _MLPERF_HOTS)), 65_536)


def synthetic_10tb() -> Preset:
    """1,000 tables of 10 TB in all: log-normal rows (sigma 2), dimensions 32-256, 1-50 ids a sample.

    Made up; equal on every machine.
    """
    draw = np.random.Generator(np.random.PCG64(1))
    spread = draw.lognormal(0, 2, 1000)
    dims = draw.choice([32, 64, 128, 256], 1000, p=[0.2, 0.3, 0.4, 0.1])
    hots = np.minimum(50, np.maximum(1, np.round(draw.lognormal(0.7, 1, 1000))))
    scale = 10e12 / float((spread * dims * 4).sum())
    rows = [max(10, int(r)) for r in spread * scale]
    return Preset(_tables(rows, [int(d) for d in dims]), tuple(map(float, hots)), 65_536)


PRESETS: Mapping[str, Callable[[], Preset]] = MappingProxyType(
    {
        "criteo_kaggle": criteo_kaggle,
        "mlperf_dlrm_dcnv2": mlperf_dlrm_dcnv2,
        "synthetic_10tb": synthetic_10tb,
    }
)
