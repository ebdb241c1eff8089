"""torchrec's table configs with one more field, and their translation to :class:`recemb.spec.TableSpec`."""

from __future__ import annotations

import math
import warnings
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
# An init_fn is measured on a tensor of at most this many elements (64 MB of fp32).
_PROBE_NUMEL = 2**24
# Two numbers of rows that an init_fn fills with deviations further apart: its scale depends on the rows.
_SAME_SCALE = 0.1


@dataclass
class EmbeddingBagConfig(TorchrecEmbeddingBagConfig):  # type: ignore[misc] # torchrec ships no types
    """torchrec's ``EmbeddingBagConfig`` plus ``compression``; uncompressed unless asked otherwise.

    An uncompressed table is filled by ``init_fn``, or uniformly between ``weight_init_min`` and
    ``weight_init_max``, as in torchrec. A compressed one has no N x D weights to fill: its rows are drawn
    with mean 0 and the root mean square of what ``init_fn`` writes, or with the deviation of that range. Of
    values that are given, a trained table's say, it takes that scale alone, and warns: load them with
    ``from_dense``.
    """

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
    # Measured once: a config is read again when its collection is sharded, planned or quantised.
    shape, known = (config.num_embeddings, config.embedding_dim), vars(config).get("_measured")
    if known is None or known[0] is not init or known[1] != shape:
        known = config._measured = init, shape, _measure(config)
    return float(known[2])


def _measure(config: TorchrecEmbeddingBagConfig) -> float:
    """Root mean square of what a custom ``init_fn`` writes: all of it that a compressed table can match.

    Raises:
        ConfigError: it fails, writes NaN, or its scale depends on the rows of a table too large to measure.
    """
    name, fits = config.name, max(1, _PROBE_NUMEL // config.embedding_dim)
    rows = min(config.num_embeddings, fits)
    # Called twice, to tell values that it draws from values that it is given.
    again = rows if rows == config.num_embeddings else max(1, rows // 2)
    with torch.random.fork_rng(devices=[]):
        first, second = _filled(config, rows), _filled(config, again)
    std, other = (float(probe.square().mean().sqrt()) for probe in (first, second))
    if not (math.isfinite(std) and math.isfinite(other)):
        raise ConfigError(f"table {name!r}: init_fn draws non-finite weights")
    if again < rows and abs(std - other) > _SAME_SCALE * max(std, other):
        raise ConfigError(
            f"table {name!r}: init_fn's scale depends on the number of rows (deviation {other:.3g} for "
            f"{again} rows, {std:.3g} for {rows}), and num_embeddings={config.num_embeddings} are too many "
            "to measure it for a compressed table; give weight_init_min and weight_init_max in its place"
        )
    if torch.equal(first[:again], second) and bool((second != second[0, 0]).any()):
        warnings.warn(
            f"table {name!r}: init_fn writes fixed values; a compressed table takes only their scale; load "
            "them with from_dense",
            UserWarning,
            stacklevel=2,
        )
    return std


@torch.no_grad()
def _filled(config: TorchrecEmbeddingBagConfig, rows: int) -> torch.Tensor:
    probe = torch.zeros(rows, config.embedding_dim, device="cpu")  # read later, whatever the default
    try:
        config.init_fn(probe)
    except Exception as error:
        raise ConfigError(
            f"table {config.name!r}: init_fn fails on a [{rows}, {config.embedding_dim}] tensor, by which "
            f"the scale of a compressed table is measured ({type(error).__name__}: {error}); give "
            "weight_init_min and weight_init_max in its place, and load weights with from_dense"
        ) from error
    return probe


def is_compressed(config: TorchrecEmbeddingBagConfig) -> bool:
    """Whether a config, ours or torchrec's own, asks for anything but rows as they are."""
    return not isinstance(getattr(config, "compression", None) or Dense(), Dense)
