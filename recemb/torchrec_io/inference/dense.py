"""The uncompressed tables of a quantised collection: torchrec's own module, made by torchrec's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig as TorchrecEmbeddingBagConfig
from torchrec.quant.embedding_modules import (
    MODULE_ATTR_CACHE_FEATURES_ORDER,
    MODULE_ATTR_EMB_CONFIG_NAME_TO_NUM_ROWS_POST_PRUNING_DICT,
    MODULE_ATTR_QUANT_STATE_DICT_SPLIT_SCALE_BIAS,
    MODULE_ATTR_REGISTER_TBES_BOOL,
    MODULE_ATTR_ROW_ALIGNMENT_INT,
)
from torchrec.quant.embedding_modules import EmbeddingBagCollection as TorchrecQuantEmbeddingBagCollection

from recemb.torchrec_io.inference.export import Traced

# What torchrec's quant_prep_* functions leave on a module for its from_float.
_PREPARED = (
    MODULE_ATTR_CACHE_FEATURES_ORDER,
    MODULE_ATTR_EMB_CONFIG_NAME_TO_NUM_ROWS_POST_PRUNING_DICT,
    MODULE_ATTR_QUANT_STATE_DICT_SPLIT_SCALE_BIAS,
    MODULE_ATTR_REGISTER_TBES_BOOL,
    MODULE_ATTR_ROW_ALIGNMENT_INT,
)


class _FloatTables(nn.Module):
    """What torchrec's ``from_float`` asks of a collection, for some of its tables."""

    def __init__(self, configs: Sequence[TorchrecEmbeddingBagConfig], is_weighted: bool) -> None:
        super().__init__()
        self._configs, self._is_weighted = list(configs), is_weighted
        self.embedding_bags = nn.ModuleDict()

    def embedding_bag_configs(self) -> list[TorchrecEmbeddingBagConfig]:
        return self._configs

    def is_weighted(self) -> bool:
        return self._is_weighted


def quantize_dense(
    configs: Sequence[TorchrecEmbeddingBagConfig],
    weights: Mapping[str, Tensor],
    module: nn.Module,
    is_weighted: bool,
) -> nn.Module:
    """torchrec's quantised collection of some uncompressed tables.

    Args:
        configs: the tables'.
        weights: [N, D] by table; half precision and float32 are read by torchrec, others are widened.
        module: the float collection, with its ``qconfig`` and what ``quant_prep_*`` has left on it.
        is_weighted: as of the collection.
    """
    tables = _FloatTables(configs, is_weighted)
    cast(Any, tables).qconfig = module.qconfig
    for name in _PREPARED:
        if hasattr(module, name):
            setattr(tables, name, getattr(module, name))
    for name, weight in weights.items():
        known = weight.detach()
        bag = nn.Module()
        bag.register_buffer(
            "weight", known if known.dtype in (torch.float32, torch.float16) else known.float()
        )
        tables.embedding_bags[name] = bag
    return cast(nn.Module, TorchrecQuantEmbeddingBagCollection.from_float(tables))


def empty_dense(
    configs: Sequence[TorchrecEmbeddingBagConfig],
    is_weighted: bool,
    device: torch.device,
    output_dtype: torch.dtype,
) -> nn.Module:
    """The same with weights still to be loaded; ``data_type`` of the configs says how they are stored."""
    return cast(
        nn.Module,
        TorchrecQuantEmbeddingBagCollection(
            tables=list(configs), is_weighted=is_weighted, device=device, output_dtype=output_dtype
        ),
    )


def trace_dense(module: nn.Module, traced: Traced) -> dict[str, Tensor]:
    """The columns of a batch that torch.export is following, by name.

    torchrec's own way there takes a batch in which no bag of these tables holds an id for impossible, and a
    program so exported refuses it. This one selects the features of each of its TBEs by one op.
    """
    dense, columns = cast(Any, module), {}
    names, features = iter(dense._embedding_names), iter(dense._feature_names)
    for tbe, tables in zip(dense._emb_modules, dense._key_to_tables.values(), strict=True):
        own = [next(features) for table in tables for _ in table.feature_names]
        bags = traced.select(own)
        pooled = tbe.forward(indices=bags.ids, offsets=bags.offsets, per_sample_weights=bags.weights)
        dims = [table.embedding_dim for table in tables for _ in table.feature_names]
        columns.update({next(names): piece for piece in torch.split(pooled, dims, dim=1)})
    return columns


def dense_bytes(module: nn.Module, table: str) -> int:
    """Bytes of a table with the padding of its rows."""
    weight = cast(Tensor, cast(nn.ModuleDict, module.embedding_bags)[table].weight)
    return weight.shape[0] * weight.stride(0) * weight.element_size()
