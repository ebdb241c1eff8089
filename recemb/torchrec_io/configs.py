"""torchrec's table configs with one more field, and their translation to :class:`recemb.spec.TableSpec`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig as TorchrecEmbeddingBagConfig

from recemb.backends.mixed_dimension import mixed_dimension_dims
from recemb.errors import ConfigError
from recemb.spec import Compression, Dense, DTypeName, MixedDimension, Pooling, TableSpec

_POOLING: dict[PoolingType, Pooling] = {PoolingType.SUM: "sum", PoolingType.MEAN: "mean"}
_DTYPES: dict[DataType, DTypeName] = {
    DataType.FP32: "float32",
    DataType.FP16: "float16",
    DataType.BF16: "bfloat16",
}
_PROBE_NUMEL = 2**16


@dataclass
class EmbeddingBagConfig(TorchrecEmbeddingBagConfig):  # type: ignore[misc] # torchrec ships no types
    """torchrec's ``EmbeddingBagConfig`` plus ``compression``; uncompressed unless asked otherwise."""

    compression: Compression = field(default_factory=Dense)

    def __post_init__(self) -> None:
        # Before torchrec's own, which divides by num_embeddings.
        TableSpec(
            name=self.name or "unnamed",
            num_embeddings=self.num_embeddings,
            embedding_dim=self.embedding_dim,
            compression=self.compression,
        )
        super().__post_init__()


def table_spec(config: TorchrecEmbeddingBagConfig) -> TableSpec:
    """What a config asks for, free of torch; a plain torchrec config is an uncompressed table.

    Raises:
        ConfigError: a field that no backend can honour.
    """
    name = config.name
    if config.pooling not in _POOLING:
        raise ConfigError(f"table {name!r}: pooling={config.pooling} is not supported; use SUM or MEAN")
    if config.data_type not in _DTYPES:
        raise ConfigError(
            f"table {name!r}: data_type={config.data_type} is not supported; use FP32, FP16 or BF16"
        )
    return TableSpec(
        name=name,
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        feature_names=tuple(config.feature_names),
        pooling=_POOLING[config.pooling],
        compression=getattr(config, "compression", None) or Dense(),
        init_std=_init_std(config),
        dtype=_DTYPES[config.data_type],
    )


def to_configs(tables: Sequence[TableSpec]) -> list[EmbeddingBagConfig]:
    """The configs of a list of tables, ready for :class:`recemb.EmbeddingBagCollection`."""
    pooling = {name: kind for kind, name in _POOLING.items()}
    dtypes = {name: kind for kind, name in _DTYPES.items()}
    configs = []
    for table in tables:
        bound = math.sqrt(3) * table.row_std
        configs.append(
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=list(table.feature_names),
                data_type=dtypes[table.dtype],
                pooling=pooling[table.pooling],
                weight_init_min=-bound,
                weight_init_max=bound,
                compression=table.compression,
            )
        )
    return configs


def mixed_dimensions(
    tables: Sequence[TorchrecEmbeddingBagConfig], temperature: float = 0.3, *, round_dims: bool = True
) -> list[EmbeddingBagConfig]:
    """Give each table the dimension of Ginart et al. (arXiv 1909.11810): d_i = lambda * n_i**(-temperature).

    lambda is set so that the smallest table keeps its full ``embedding_dim``. Dimensions are clipped to
    [1, D] and, with ``round_dims``, rounded to the nearest power of two; a table that keeps d = D stays
    uncompressed.

    Args:
        tables: torchrec or recemb configs; other fields are kept.
        temperature: alpha in [0, 1]; 0 keeps every dimension, 0.3 is dlrm's default, at which large
            Criteo tables fall to a few columns.

    Returns:
        New configs; the ones given are left as they are.
    """
    dims = mixed_dimension_dims([table_spec(config) for config in tables], temperature, round_dims=round_dims)
    return [
        replace(
            as_recemb_config(config),
            compression=Dense() if dim == config.embedding_dim else MixedDimension(dim=dim),
        )
        for config, dim in zip(tables, dims, strict=True)
    ]


def as_recemb_config(config: TorchrecEmbeddingBagConfig) -> EmbeddingBagConfig:
    """A recemb config with every field of ``config``; itself when it already is one."""
    if isinstance(config, EmbeddingBagConfig):
        return config
    fields = {name: getattr(config, name) for name in TorchrecEmbeddingBagConfig.__dataclass_fields__}
    return EmbeddingBagConfig(**fields)


def _init_std(config: TorchrecEmbeddingBagConfig) -> float:
    """Deviation of the rows that the config's ``init_fn`` draws."""
    init = config.init_fn
    if (
        isinstance(init, partial)
        and init.func is torch.nn.init.uniform_
        and init.keywords.keys() == {"a", "b"}
    ):
        return float(init.keywords["b"] - init.keywords["a"]) / math.sqrt(12)
    if not is_compressed(config):
        return float(config.get_weight_init_max() - config.get_weight_init_min()) / math.sqrt(12)
    # A custom init_fn fills an N x D tensor; a compressed table can only match its scale, so measure that.
    with torch.random.fork_rng(devices=[]):
        rows = max(1, min(config.num_embeddings, _PROBE_NUMEL // config.embedding_dim))
        probe = torch.zeros(rows, config.embedding_dim, device="cpu")  # read below, whatever the default
        with torch.no_grad():
            init(probe)
    std = float(probe.square().mean().sqrt())
    if not math.isfinite(std):
        raise ConfigError(f"table {config.name!r}: init_fn draws non-finite weights")
    return std


def is_compressed(config: TorchrecEmbeddingBagConfig) -> bool:
    """Whether a config, ours or torchrec's own, asks for anything but rows as they are."""
    return not isinstance(getattr(config, "compression", None) or Dense(), Dense)
