"""The mean over bags of tables whose rows are split over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.torchrec_io.sharding.placement import ROWS_SPLIT


class SplitMeans:
    """What the summed output of row-wise MEAN tables is divided by.

    torchrec's own divisor (1.5 to 1.8 at least) also divides every table that is not split row-wise by its
    bag lengths, means that have been taken already among them; this one is 1 there. And torchrec divides no
    table under grid sharding, whose rows are split too: its mean is the sum.

    Args:
        configs: all tables of the collection.
        plan: by table name.
    """

    def __init__(self, configs: Sequence[EmbeddingBagConfig], plan: Mapping[str, ParameterSharding]) -> None:
        features = [feature for config in configs for feature in config.feature_names]
        self._feature: dict[str, str] = {}
        for config in configs:
            if config.pooling != PoolingType.MEAN or plan[config.name].sharding_type not in ROWS_SPLIT:
                continue
            for feature in config.feature_names:
                shared = features.count(feature) > 1
                self._feature[f"{feature}@{config.name}" if shared else feature] = feature

    def __bool__(self) -> bool:
        return bool(self._feature)

    def divisor(self, batch: KeyedJaggedTensor, names: Sequence[str], dims: Sequence[int]) -> Tensor:
        """[B, sum of D] float32.

        Args:
            batch: this rank's.
            names: of the output's columns blocks, in order.
            dims: their widths.
        """
        keys, inverse = batch.keys(), batch.inverse_indices_or_none()
        variable = batch.variable_stride_per_key()
        lengths = batch.lengths().split(batch.stride_per_key())
        size = inverse[1].shape[1] if variable else batch.stride()
        divisor = torch.ones(size, sum(dims), device=batch.device())
        start = 0
        for name, dim in zip(names, dims, strict=True):
            if name in self._feature:
                feature = self._feature[name]
                own = lengths[keys.index(feature)]
                if variable:
                    own = own[inverse[1][inverse[0].index(feature)]]
                divisor[:, start : start + dim] = own.clamp(min=1)[:, None]
            start += dim
        return divisor
