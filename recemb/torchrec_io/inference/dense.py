"""The uncompressed tables of a quantised collection: torchrec's own module, made by torchrec's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_configs import EmbeddingBagConfig as TorchrecEmbeddingBagConfig
from torchrec.quant.embedding_modules import (
    MODULE_ATTR_CACHE_FEATURES_ORDER,
    MODULE_ATTR_EMB_CONFIG_NAME_TO_NUM_ROWS_POST_PRUNING_DICT,
    MODULE_ATTR_QUANT_STATE_DICT_SPLIT_SCALE_BIAS,
    MODULE_ATTR_REGISTER_TBES_BOOL,
    MODULE_ATTR_ROW_ALIGNMENT_INT,
)
from torchrec.quant.embedding_modules import EmbeddingBagCollection as TorchrecQuantEmbeddingBagCollection

from recemb.errors import ConfigError
from recemb.inference.rows import check_rows
from recemb.inference.table import QuantizedBackend
from recemb.spec import TableSpec
from recemb_kernels.storage import DTYPES, StoredAs, stored_width

_KINDS = {
    DataType.INT8: StoredAs.TBE_INT8,
    DataType.FP16: StoredAs.FLOAT16,
    DataType.FP32: StoredAs.FLOAT32,
}
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


def check_storable(configs: Sequence[TorchrecEmbeddingBagConfig], weights: Mapping[str, Tensor]) -> None:
    """Raise :class:`ConfigError` where fbgemm has no rows of ``data_type`` for an uncompressed table.

    Args:
        configs: the tables', with the ``data_type`` that is asked for.
        weights: [N, D] by table.
    """
    for config in configs:
        if config.data_type == DataType.INT8 and config.embedding_dim % 2:
            raise ConfigError(
                f"table {config.name!r} is uncompressed and its embedding_dim={config.embedding_dim} odd, "
                "which fbgemm does not store in int8; use an even one, or store it in half precision: "
                f"per_table_weight_dtype={{{config.name!r}: torch.float16}}"
            )
        # Bytes, and what is smaller, have scales and biases in half precision.
        kind = _KINDS.get(config.data_type, StoredAs.TBE_INT8)
        check_rows(weights[config.name], kind, f"table {config.name!r}: weight")


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


def in_place(module: nn.Module, tables: Sequence[TableSpec]) -> dict[str, QuantizedBackend] | None:
    """The module's own weights as tables of the engine's, by name: nothing is copied.

    One look-up then serves compressed and uncompressed tables, where torchrec's module costs a call, and a
    rearrangement of the batch, of its own.

    Returns:
        ``None`` when the module is sharded, on another device, or has rows that the engine does not read.
    """
    if type(module) is not TorchrecQuantEmbeddingBagCollection:
        return None
    specs, found = {table.name: table for table in tables}, {}
    known = cast(Any, module)
    for tbe, configs in zip(known._emb_modules, known._key_to_tables.values(), strict=True):
        if torch.compiler.is_exporting():
            # torch.export follows the module's buffers, and would keep what the TBE gives as constants beside
            # them.
            whole = [known.embedding_bags[config.name].weight for config in configs]
        else:
            whole = [rows for rows, *_ in tbe.split_embedding_weights_with_scale_bias(0)]
        for config, rows in zip(configs, whole, strict=True):
            kind, spec = _KINDS.get(config.data_type), specs[config.name]
            if kind is None or not rows.is_cpu or not rows.is_contiguous():
                return None
            stored = rows.view(DTYPES[kind])
            if tuple(stored.shape) != (spec.num_embeddings, stored_width(kind, spec.embedding_dim)):
                return None
            table = QuantizedBackend(spec, (spec,), None, kind, torch.device("meta"))
            cast(Any, table)._parameters["weight"] = stored
            found[spec.name] = table
    return found


def dense_bytes(module: nn.Module, table: str) -> int:
    """Bytes of a table with the padding of its rows."""
    weight = cast(Tensor, cast(nn.ModuleDict, module.embedding_bags)[table].weight)
    return weight.shape[0] * weight.stride(0) * weight.element_size()
