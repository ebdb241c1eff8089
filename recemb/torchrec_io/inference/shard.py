"""torchrec's ``shard_quant_model`` for models with quantised collections of recemb's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.fused_params import FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS
from torchrec.distributed.global_settings import set_propogate_device
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import ShardedTensor, ShardingPlan, ShardingType
from torchrec.inference import modules as torchrec_inference
from torchrec.modules.embedding_configs import DataType, PoolingType

from recemb.errors import ConfigError
from recemb.torchrec_io.inference.collection import QuantEmbeddingBagCollection

_Weights = dict[str, Tensor]
_ROW_WISE = {
    ShardingType.ROW_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.GRID_SHARD.value,
}


def shard_quant_model(
    model: nn.Module,
    world_size: int = 1,
    compute_device: str = "cuda",
    sharding_device: str = "meta",
    **options: Any,
) -> tuple[nn.Module, ShardingPlan]:
    """Shard a quantised model's uncompressed tables by torchrec's quant sharder; replicate the others.

    torchrec's function of that name, on models of :func:`recemb.torchrec_io.quantize_embeddings`. It differs
    in three ways. With ``compute_device="cpu"`` it has torchrec place tables where it is told, which
    otherwise has "cuda" written in: torchrec's ``set_propogate_device(True)``, which is the process's and
    stays, because sharded modules read it again in their first look-up. Unless ``sharding_device`` is "meta"
    the sharded tables hold the weights that the model had; torchrec leaves them to be loaded. And
    half-precision tables, which torchrec's default sharders fail on, get one that takes them. Compressed
    tables have no plan: they stay in their collection, on its device.

    Column-wise sharding of int8 tables needs their scales apart from their weights: call torchrec's
    ``quant_prep_enable_quant_state_dict_split_scale_bias_for_types(model, [EmbeddingBagCollection])`` before
    they are quantised. torchrec shards half-precision tables table-wise only, and adds up the means of parts
    where it splits the rows of a table with mean pooling, so that is refused.

    Args:
        model: the model, not a collection by itself; it is changed in place, as torchrec does.
        world_size: devices to shard over, in this process.
        compute_device: "cuda" or "cpu".
        sharding_device: where tables are made; "meta" for weights that are loaded later.
        options: torchrec's other arguments: ``sharders``, ``constraints`` (tables without one are placed
            whole), ``sharding_plan``, ...

    Raises:
        ConfigError: the model is a collection itself, a constraint names a compressed table, or a constraint
            or a plan splits the rows of one with mean pooling. Nothing has changed by then.
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantEmbeddingBagCollection)
    }
    if "" in found:
        raise ConfigError(
            "torchrec replaces tables within a model, and this is a collection; wrap it in a module"
        )
    dense = {path: module.dense for path, module in found.items() if module.dense is not None}
    if options.get("constraints"):
        options["constraints"] = _checked(options["constraints"], found, world_size)
    _check_plan(options.get("sharding_plan"), found)
    if compute_device == "cpu":
        set_propogate_device(True)
    # Bytes come with scales and biases, which torchrec's default has apart from them; other types have none.
    apart = all(_all_bytes(tables) for tables in dense.values())
    if not options.get("sharders") and not apart:
        options["sharders"] = _sharders_of_other_types()
    weights = {path: _weights_of(tables, apart) for path, tables in dense.items()}
    sharded, plan = torchrec_inference.shard_quant_model(
        model, world_size, compute_device, sharding_device, **options
    )
    if sharding_device != "meta":
        for path, held in weights.items():
            _fill(cast(nn.Module, sharded.get_submodule(path).dense), held)
    return sharded, plan


def _checked(
    constraints: Mapping[str, ParameterConstraints],
    found: Mapping[str, QuantEmbeddingBagCollection],
    world_size: int,
) -> dict[str, ParameterConstraints]:
    """The constraints, with one for every uncompressed table."""
    whole = ParameterConstraints(
        sharding_types=[ShardingType.TABLE_WISE.value], compute_kernels=[EmbeddingComputeKernel.QUANT.value]
    )
    complete = dict(constraints)
    for path, module in found.items():
        for config in module.embedding_bag_configs():
            name = config.name
            if name in constraints and name in module.embedding_bags:
                raise ConfigError(
                    f"table {name!r} of {path!r} is compressed, and replicated: torchrec's quant sharder "
                    "takes uncompressed tables only; remove it from the constraints"
                )
            if name in module.embedding_bags:
                continue
            types = complete.setdefault(name, whole).sharding_types
            splits = bool(_ROW_WISE & set(types or _ROW_WISE))
            if world_size > 1 and splits and config.pooling == PoolingType.MEAN:
                raise _splits_means(name)
    return complete


def _check_plan(plan: ShardingPlan | None, found: Mapping[str, QuantEmbeddingBagCollection]) -> None:
    for path, module in found.items():
        placed = {} if plan is None else plan.plan.get(f"{path}.dense", {})
        for config in module.embedding_bag_configs():
            where = placed.get(config.name)
            if where is None or config.pooling != PoolingType.MEAN or len(where.ranks or ()) < 2:
                continue
            if where.sharding_type in _ROW_WISE:
                raise _splits_means(config.name)


def _splits_means(table: str) -> ConfigError:
    return ConfigError(
        f"table {table!r} has mean pooling and may be split by rows, where torchrec's quantised look-up adds "
        "up the means of the parts; allow sharding_types=['table_wise'] or ['column_wise'] only"
    )


def _all_bytes(dense: nn.Module) -> bool:
    return all(config.data_type == DataType.INT8 for config in cast(Any, dense).embedding_bag_configs())


def _sharders_of_other_types() -> list[Any]:
    """torchrec's default sharders, with scales and biases in their rows."""
    params = {**torchrec_inference.DEFAULT_FUSED_PARAMS, FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS: False}
    return [type(sharder)(fused_params=params) for sharder in torchrec_inference.DEFAULT_SHARDERS]


def _weights_of(dense: nn.Module, apart: bool) -> _Weights:
    """The weights of each table, by the names that torchrec's sharded module gives them.

    Args:
        dense: the module.
        apart: whether scales and biases have names of their own.
    """
    held: _Weights = {}
    known = cast(Any, dense)
    for tbe, tables in zip(known._emb_modules, known._key_to_tables.values(), strict=True):
        for table, parts in zip(tables, tbe.split_embedding_weights_with_scale_bias(2 * apart), strict=True):
            for suffix, part in zip(("", "_qscale", "_qbias"), parts, strict=True):
                if part is not None:
                    held[f"embedding_bags.{table.name}.weight{suffix}"] = part
    return held


@torch.no_grad()
def _fill(sharded: nn.Module, held: _Weights) -> None:
    state = sharded.state_dict()
    for name, whole in held.items():
        for part, (row, column) in _parts(state[name]):
            # Every part of the columns has the scales and biases of its rows.
            first = column if name.endswith(".weight") else 0
            part.copy_(whole[row : row + part.shape[0], first : first + part.shape[1]])


def _parts(stored: Tensor | ShardedTensor | list[Tensor]) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Tensors of this process, each with its place in the whole."""
    if isinstance(stored, ShardedTensor):
        for shard in stored.local_shards():
            row, column = shard.metadata.shard_offsets
            yield shard.tensor, (row, column)
        return
    # A list holds the scales, or biases, of each part of the columns.
    for part in stored if isinstance(stored, list) else [stored]:
        yield part, (0, 0)
